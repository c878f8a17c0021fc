"""What a bake-off writes: a table, results.csv, results.png, report.txt, and the data of results.json."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .advice import advise
from .contestants import REFERENCE
from .runner import Outcome
from .settings import Settings
from .standings import MEAN, Comparison, Standing
from .statistics import Estimate
from .texts import MARKED, RUNNING, Row

HEADS = {MEAN: "mean of\ndomains", MARKED: "two domains\nmarked", RUNNING: "behind\nthe switch"}
WIDE = (MEAN, RUNNING)
"""Columns that show their interval; those of the others are in the files."""


def report(
    settings: Settings, rows: Sequence[Row], outcome: Outcome, out: Path, console: Console
) -> dict[str, Any]:
    """Print the table and the advice, write the files, and return the results as plain data."""
    comparisons = {
        measure: Comparison(outcome.contestants, outcome.records, rows, measure, settings.score.draws)
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
    drawn = _plot(comparisons[settings.score.measures[0]], rows, out / "results.png", console)
    files = ["results.json", "results.csv", "report.txt", *(["results.png"] if drawn else [])]
    console.print(f"Kept in {out}: {', '.join(files)}.", highlight=False)
    return {
        "measures": {measure: _plain(comparison) for measure, comparison in comparisons.items()},
        "advice": advice,
        "notes": outcome.notes,
        "failed": outcome.failed,
        "reused": outcome.reused,
    }


def tables(comparison: Comparison, rows: Sequence[Row], console: Console) -> list[Table]:
    """One table where the console is wide enough, else one per domain and one of the rest."""
    domains = [row.name for row in rows if row.kind == "expert"]
    whole = table(comparison, rows)
    if console.measure(whole).maximum <= console.width:
        return [whole]
    others = [row.name for row in rows if row.kind != "expert"]
    return [
        table(comparison, rows, without=[MEAN, *others]),
        table(comparison, rows, without=domains),
    ]


def table(comparison: Comparison, rows: Sequence[Row], without: Sequence[str] = ()) -> Table:
    """Methods by their mean share, references on top; columns of rows and costs.

    Costs stand beside the mean.
    """
    loss = comparison.measure == "loss"
    change = "change of the loss against the base in %" if loss else "change against the base in points"
    lines = Table(
        title=f"% of the oracle's gain over the base, by {'loss' if loss else 'exact answers'}; "
        f"*: no expert, {change}; [95 % interval]",
        header_style="bold",
    )
    shares, changes = ([row for row in some if row not in without] for some in columns(comparison, rows))
    costs = ("trained\nparameters", "seconds\nto make", "tokens/s\nscoring") if MEAN in shares else ()
    for name in ("method", "group"):
        lines.add_column(name)
    for row in shares:
        lines.add_column(HEADS.get(row, row), justify="right", no_wrap=True)
    for row in changes:
        lines.add_column(f"{row}*", justify="right")
    for name in costs:
        lines.add_column(name, justify="right")
    references = [s for s in comparison.standings.values() if s.group == REFERENCE]
    for one in [*references, *comparison.ranked()]:
        style = "dim" if one.group == REFERENCE else ""
        cells = _cells(one, shares, changes) + (_costs(one) if costs else [])
        lines.add_row(*cells, style=style, end_section=one is references[-1])
    return lines


def columns(comparison: Comparison, rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Names of the rows with shares, the mean among them, and of those without an expert."""
    domains = [row.name for row in rows if row.kind == "expert"]
    mixed = [row.name for row in rows if row.kind == "mixed"]
    mean = [MEAN] if comparison.gainful else []
    return [*domains, *mean, *mixed], [row.name for row in rows if row.kind in ("generic", "unseen")]


def _cells(one: Standing, shares: Sequence[str], changes: Sequence[str]) -> list[str]:
    seeds = f" ({one.seeds} seeds)" if one.seeds > 1 else ""
    return [
        one.name + seeds,
        one.group,
        *(_share(one.shares[row], row in WIDE) for row in shares),
        *(_change(one.changes[row]) for row in changes),
    ]


def _costs(one: Standing) -> list[str]:
    made = one.cost.tokens_per_second > 0
    return [
        f"{one.cost.trainable:,}" if one.cost.trainable else "–",
        f"{one.cost.seconds:.0f}" if made else "–",
        f"{one.cost.tokens_per_second:,.0f}" if made else "–",
    ]


def _share(estimate: Estimate, wide: bool) -> str:
    e = estimate.scaled(100)
    if not wide or e.low == e.high:
        return f"{e.value:.0f}"
    # Rich reads "[" as markup.
    return f"{e.value:.0f} \\[{e.low:.0f}, {e.high:.0f}]"


def _change(estimate: Estimate) -> str:
    # Where the base hardly errs, a loss may grow a thousandfold.
    value = estimate.value
    return f"×{1 + value:,.0f}" if value > 10 else f"{100 * value:+.1f}"


def _plain(comparison: Comparison) -> dict[str, Any]:
    return {
        name: {
            "group": one.group,
            "seeds": one.seeds,
            "values": {row: asdict(e) for row, e in one.values.items()},
            "shares": {row: asdict(e) for row, e in one.shares.items()},
            "changes": {row: asdict(e) for row, e in one.changes.items()},
            "cost": asdict(one.cost),
        }
        for name, one in comparison.standings.items()
    }


def write_csv(path: Path, comparisons: dict[str, Comparison]) -> None:
    """One line per measure, method, row and quantity."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["measure", "method", "group", "seeds", "row", "quantity", "value", "low", "high"])
        for measure, comparison in comparisons.items():
            for one in comparison.standings.values():
                for quantity in ("values", "shares", "changes"):
                    for row, e in getattr(one, quantity).items():
                        place = [measure, one.name, one.group, one.seeds, row, quantity.removesuffix("s")]
                        writer.writerow([*place, e.value, e.low, e.high])


def _plot(comparison: Comparison, rows: Sequence[Row], path: Path, console: Console) -> bool:
    try:
        from .plot import plot
    except ImportError:
        console.print("No picture: matplotlib is missing; pip install 'peft-moe[bakeoff]'", markup=False)
        return False
    plot(comparison, rows, path)
    return True
