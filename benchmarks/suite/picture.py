"""The picture of the growth with the number of experts."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .results import OURS, Row

# Fixed per method, so that pictures of different runs can be compared.
COLOURS = {
    OURS: "#c0392b",
    "LoRA k·r": "#95a5a6",
    "LoRA E·r": "#34495e",
    "mergoo": "#2980b9",
    "PEFT X-LoRA": "#27ae60",
    "PEFT Arrow": "#8e44ad",
    "ours, reference": "#e67e22",
}
RANK = 16


def draw(rows: list[Row], path: Path) -> bool:
    """Draw the time relative to the bare base over E; return False if there are no rows to draw."""
    panels = {
        f"one layer, forward, r={RANK}, top-2": [
            row
            for row in rows
            if (row.level, row.step) == ("layer", "forward")
            and (row.case.rank, row.case.top_k, row.case.width) == (RANK, 2, 1024)
            and row.case.tokens > 1
        ],
        f"prefill of the 30M model, r={RANK}, top-2": [r for r in rows if r.level == "growth, prefill"],
    }
    panels = {title: chosen for title, chosen in panels.items() if chosen}
    if not panels:
        return False
    figure = Figure(figsize=(5.2 * len(panels), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (title, chosen) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), number + 1)
        for name, colour in COLOURS.items():
            points = sorted((r.case.experts, r.to["base"]) for r in chosen if r.method == name)
            if not points:
                continue
            counts = [count for count, _ in points]
            axes.plot(
                counts, [s.middle for _, s in points], color=colour, marker="o", markersize=3,
                linewidth=2.5 if name == OURS else 1.2, label=name,
            )  # fmt: skip
            axes.fill_between(
                counts, [s.low for _, s in points], [s.high for _, s in points], color=colour, alpha=0.15
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(counts_of(chosen), [str(count) for count in counts_of(chosen)])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("experts")
        axes.set_ylabel("time ÷ bare base")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    return True


def counts_of(rows: list[Row]) -> list[int]:
    """Return the numbers of experts, ascending."""
    return sorted({row.case.experts for row in rows})
