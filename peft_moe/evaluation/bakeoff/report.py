"""The report of a bake-off: tables, results.csv, results.png, report.txt, and the data of results.json."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .comparison import MEAN, Comparison, MethodResult
from .methods import REFERENCE
from .recommendation import advise
from .records import Outcome
from .settings import Settings
from .statistics import Estimate
from .texts import MARKED, RUNNING, Row

HEADS = {MEAN: "mean of\ndomains", MARKED: "two domains\nmarked", RUNNING: "after\nthe switch"}
COSTS = ("trainable", "seconds", "tokens_per_second")
WITH_INTERVAL = (MEAN, RUNNING)
"""Columns that show their intervals; the files hold the intervals of all columns."""


def report(
    settings: Settings, rows: Sequence[Row], outcome: Outcome, out: Path, console: Console
) -> dict[str, Any]:
    """Print the tables and the advice, write all files but results.json, and return its data."""
    comparisons = {
        measure: Comparison(outcome.methods, outcome.records, rows, measure, settings.score.draws)
        for measure in settings.score.measures
    }
    advice = advise(comparisons[settings.score.measures[0]])
    with (out / "report.txt").open("w", encoding="utf-8") as file:
        for target in (console, Console(file=file, width=240)):
            for comparison in comparisons.values():
                for part in tables(comparison, rows, target):
                    target.print(part)
            for name, note in outcome.notes.items():
                target.print(f"{name}: {note}", markup=False, highlight=False)
            for line in advice:
                target.print(f"• {line}", markup=False, highlight=False)
    write_csv(out / "results.csv", comparisons)
    has_plot = _plot(comparisons[settings.score.measures[0]], rows, out / "results.png", console)
    files = ["results.json", "results.csv", "report.txt", *(["results.png"] if has_plot else [])]
    console.print(f"Saved in {out}: {', '.join(files)}.", highlight=False)
    return {
        "measures": {measure: _plain(comparison) for measure, comparison in comparisons.items()},
        "advice": advice,
        "notes": outcome.notes,
        "failed": outcome.failed,
        "reused": outcome.reused,
    }


@dataclass(frozen=True)
class Column:
    """One column: a heading and one cell per method."""

    head: str
    cells: list[str]

    @property
    def width(self) -> int:
        """The width in characters, with the frame."""
        return max(cell_len(line) for text in (self.head, *self.cells) for line in text.split("\n")) + 3


def tables(comparison: Comparison, rows: Sequence[Row], console: Console) -> list[Table]:
    """Return one table if it fits the console, or several, each with the methods' names.

    References come first, then the methods in the order of their mean share.
    """
    references = [s for s in comparison.results.values() if s.group == REFERENCE]
    lines = [*references, *comparison.ranked()]
    name = Column("method", [s.name + (f" ({s.seeds} seeds)" if s.seeds > 1 else "") for s in lines])
    parts: list[list[Column]] = [[]]
    free_width = console.width - name.width - 1
    for column in columns(lines, comparison, rows):
        if parts[-1] and sum(c.width for c in parts[-1]) + column.width > free_width:
            parts.append([])
        parts[-1].append(column)
    by, unit = ("loss", "% of its loss") if comparison.measure == "loss" else ("exact answers", "points")
    title = f"% of the oracle's gain over the base, by {by}; *: no expert, change against the base in {unit}"
    tables = []
    for part in parts:
        table = Table(title=f"{title}; [95 % interval]", header_style="bold")
        table.add_column(name.head)
        for column in part:
            table.add_column(column.head, justify="right")
        for number, result in enumerate(lines):
            cells = [Text(column.cells[number]) for column in (name, *part)]
            style = "dim" if result.group == REFERENCE else ""
            table.add_row(*cells, style=style, end_section=result is references[-1])
        tables.append(table)
    return tables


def columns(lines: Sequence[MethodResult], comparison: Comparison, rows: Sequence[Row]) -> list[Column]:
    """Return the columns of group, shares, changes and costs."""
    kinds = {kind: [row.name for row in rows if row.kind == kind] for kind in ("expert", "mixed")}
    mean = [MEAN] if comparison.gainful else []
    measured = [result.cost.tokens_per_second > 0 for result in lines]
    return [
        Column("group", [result.group for result in lines]),
        *(
            Column(
                HEADS.get(row, row), [_share(result.shares[row], row in WITH_INTERVAL) for result in lines]
            )
            for row in (*kinds["expert"], *mean, *kinds["mixed"])
        ),
        *(
            Column(f"{row.name}*", [_change(result.changes[row.name]) for result in lines])
            for row in rows
            if row.kind in ("generic", "unseen")
        ),
        Column("trained\nparameters", [f"{s.cost.trainable:,}" if s.cost.trainable else "–" for s in lines]),
        Column(
            "seconds\nto build",
            [f"{s.cost.seconds:.0f}" if m else "–" for s, m in zip(lines, measured, strict=True)],
        ),
        Column(
            "tokens/s\nscoring",
            [f"{s.cost.tokens_per_second:,.0f}" if m else "–" for s, m in zip(lines, measured, strict=True)],
        ),
    ]


def _share(estimate: Estimate, with_interval: bool) -> str:
    e = estimate.scaled(100)
    if not with_interval or e.low == e.high:
        return f"{e.value:.0f}"
    return f"{e.value:.0f} [{e.low:.0f}, {e.high:.0f}]"


def _change(estimate: Estimate) -> str:
    # Where the base's loss is near 0, a loss may grow a thousandfold.
    value = estimate.value
    return f"×{1 + value:,.0f}" if value > 10 else f"{100 * value:+.1f}"


def _plain(comparison: Comparison) -> dict[str, Any]:
    best = comparison.ranked()[0].name if comparison.gainful and comparison.ranked() else None
    return {
        name: {
            "group": result.group,
            "seeds": result.seeds,
            "values": {row: asdict(e) for row, e in result.values.items()},
            "shares": {row: asdict(e) for row, e in result.shares.items()},
            "changes": {row: asdict(e) for row, e in result.changes.items()},
            "cost": asdict(result.cost),
            # This difference is paired over texts and seeds; two shares with overlapping intervals may still
            # differ significantly.
            "behind_best": asdict(comparison.difference(best, name)) if best else None,
        }
        for name, result in comparison.results.items()
    }


def write_csv(path: Path, comparisons: dict[str, Comparison]) -> None:
    """Write one line per measure, method, row and quantity; costs have neither row nor interval."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["measure", "method", "group", "seeds", "row", "quantity", "value", "low", "high"])
        for measure, comparison in comparisons.items():
            for result in comparison.results.values():
                method = [measure, result.name, result.group, result.seeds]
                for quantity in ("values", "shares", "changes"):
                    for row, e in getattr(result, quantity).items():
                        name = quantity.removesuffix("s")
                        writer.writerow([*method, row, name, e.value, e.low, e.high])
                for quantity in COSTS if result.cost.tokens_per_second > 0 else ():
                    value = getattr(result.cost, quantity)
                    writer.writerow([*method, "", quantity, value, "", ""])


def _plot(comparison: Comparison, rows: Sequence[Row], path: Path, console: Console) -> bool:
    try:
        from .plot import plot
    except ImportError:
        console.print("No plot: matplotlib is not installed; pip install 'peft-moe[bakeoff]'", markup=False)
        return False
    plot(comparison, rows, path)
    return True
