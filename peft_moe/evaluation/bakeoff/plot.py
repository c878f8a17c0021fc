"""The plot: each method's share of the oracle's gain, also after a switch, and its harm elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .comparison import MEAN, Comparison, MethodResult
from .methods import FITTED, NO_DATA, RETRAINED, TRAINED
from .texts import RUNNING, Row

# Okabe and Ito's colours, which colour-blind readers can distinguish; the markers differ as well.
MARKERS = {
    NO_DATA: ("#999999", "o"),
    FITTED: ("#0072B2", "s"),
    TRAINED: ("#D55E00", "D"),
    RETRAINED: ("#009E73", "^"),
}

WITHOUT_EXPERT = ("generic", "unseen")
LOWEST = -100.0
"""Smaller shares are drawn at this edge, so that one bad method does not squeeze the rest together."""


def plot(comparison: Comparison, rows: Sequence[Row], path: Path) -> None:
    """Write a PNG with one line per method, the best on top, and 95 % intervals."""
    methods = comparison.ranked()[::-1]
    panels = _panels(comparison, rows)
    figure = Figure(figsize=(3.2 + 3.4 * max(1, len(panels)), 1.6 + 0.3 * max(4, len(methods))))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, max(1, len(panels)), sharey=True, squeeze=False)[0]
    for axis, (row, title) in zip(axes, panels, strict=False):
        _panel(axis, methods, row)
        axis.set_title(title, fontsize=9)
    axes[0].set_yticks(range(len(methods)), [method.name for method in methods], fontsize=8)
    handles = [axes[0].plot([], [], mark, color=colour)[0] for colour, mark in MARKERS.values()]
    figure.legend(handles, list(MARKERS), loc="lower center", ncols=len(MARKERS), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=150)


def _panels(comparison: Comparison, rows: Sequence[Row]) -> list[tuple[str, str]]:
    panels = [(MEAN, "% of the oracle's gain,\nmean of domains")] if comparison.gainful else []
    panels += [(RUNNING, "% of the oracle's gain\nafter the switch") for row in rows if row.name == RUNNING]
    unit = "loss, %" if comparison.measure == "loss" else "exact, points"
    panels += [(r.name, f"{r.name} ({r.kind}):\nchange of {unit}") for r in rows if r.kind in WITHOUT_EXPERT]
    return panels


def _panel(axis: Any, methods: Sequence[MethodResult], row: str) -> None:
    for y, method in enumerate(methods):
        estimate = method.shares.get(row, method.changes.get(row))
        if estimate is None:
            continue
        e = estimate.scaled(100)
        colour, mark = MARKERS[method.group]
        axis.plot([e.low, e.high], [y, y], color=colour, linewidth=1.5)
        too_low = row in (MEAN, RUNNING) and e.value < LOWEST
        x, mark = (LOWEST, "<") if too_low else (e.value, mark)
        axis.plot(x, y, mark, color=colour, markersize=5, clip_on=False)
    axis.axvline(0, color="black", linewidth=0.8)
    if row in (MEAN, RUNNING):
        axis.axvline(100, color="black", linewidth=0.8, linestyle=":")
        axis.set_xlim(left=max(axis.get_xlim()[0], LOWEST), right=max(axis.get_xlim()[1], 105.0))
    axis.grid(axis="x", alpha=0.3)
    axis.tick_params(axis="x", labelsize=8)
