"""One picture: every method's share of the oracle's gain, behind a switch, and its harm elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .comparison import MEAN, Comparison, MethodResult
from .methods import FITTED, NO_DATA, RETRAINED, TRAINED
from .statistics import Estimate
from .texts import RUNNING, Row

# Okabe and Ito's colours, told apart by every eye; the marks differ too.
LOOKS = {
    NO_DATA: ("#999999", "o"),
    FITTED: ("#0072B2", "s"),
    TRAINED: ("#D55E00", "D"),
    RETRAINED: ("#009E73", "^"),
}


LOOSE = ("generic", "unseen")
FLOOR = -100.0
"""Shares below it are marked at the edge: a sum of strong experts may lie far down, and the rest must stay
readable."""


def plot(comparison: Comparison, rows: Sequence[Row], path: Path) -> None:
    """Write a PNG with one line per method, best on top, and 95 % intervals."""
    methods = comparison.ranked()[::-1]
    panels = [(row, title) for row, title in _panels(comparison, rows)]
    figure = Figure(figsize=(3.2 + 3.4 * max(1, len(panels)), 1.6 + 0.3 * max(4, len(methods))))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, max(1, len(panels)), sharey=True, squeeze=False)[0]
    for axis, (row, title) in zip(axes, panels, strict=False):
        _panel(axis, methods, row)
        axis.set_title(title, fontsize=9)
    axes[0].set_yticks(range(len(methods)), [one.name for one in methods], fontsize=8)
    handles = [axes[0].plot([], [], mark, color=colour)[0] for colour, mark in LOOKS.values()]
    figure.legend(handles, list(LOOKS), loc="lower center", ncols=len(LOOKS), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=150)


def _panels(comparison: Comparison, rows: Sequence[Row]) -> list[tuple[str, str]]:
    found = [(MEAN, "% of the oracle's gain,\nmean of domains")] if comparison.gainful else []
    found += [(RUNNING, "% of the oracle's gain\nbehind the switch") for row in rows if row.name == RUNNING]
    unit = "loss, %" if comparison.measure == "loss" else "exact, points"
    found += [(r.name, f"{r.name} ({r.kind}):\nchange of {unit}") for r in rows if r.kind in LOOSE]
    return found


def _panel(axis: Any, methods: Sequence[MethodResult], row: str) -> None:
    for place, one in enumerate(methods):
        found = one.shares.get(row, one.changes.get(row))
        if found is None:
            continue
        e: Estimate = found.scaled(100)
        colour, mark = LOOKS[one.group]
        axis.plot([e.low, e.high], [place, place], color=colour, linewidth=1.5)
        off = row in (MEAN, RUNNING) and e.value < FLOOR
        where, how = (FLOOR, "<") if off else (e.value, mark)
        axis.plot(where, place, how, color=colour, markersize=5, clip_on=False)
    axis.axvline(0, color="black", linewidth=0.8)
    if row in (MEAN, RUNNING):
        axis.axvline(100, color="black", linewidth=0.8, linestyle=":")
        axis.set_xlim(left=max(axis.get_xlim()[0], FLOOR), right=max(axis.get_xlim()[1], 105.0))
    axis.grid(axis="x", alpha=0.3)
    axis.tick_params(axis="x", labelsize=8)
