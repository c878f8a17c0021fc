"""What a model forgets while it learns one domain after the other.

Every figure is a loss or a difference of losses, in nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import PeftMoeError
from ..io.atomic import replace_file
from ..io.json_files import write_json


@dataclass
class ForgettingReport:
    """Held-out losses of all domains after every stage.

    Args:
        before: loss of each domain before the first stage.
        stages: name, trained domains and losses of each stage; use :meth:`add_stage`.
    """

    before: dict[str, float]
    stages: list[tuple[str, tuple[str, ...], dict[str, float]]] = field(default_factory=list)

    def add_stage(self, name: str, learnt: Sequence[str], losses: Mapping[str, float]) -> None:
        """Add the losses after a stage.

        Args:
            name: the stage's name.
            learnt: the domains that it trained on.
            losses: the loss of every domain.

        Raises:
            PeftMoeError: the domains differ from those of the first measurement.
        """
        if set(losses) != set(self.before):
            raise PeftMoeError(
                f"stage {name!r}: losses of {sorted(losses)}, but the report began with "
                f"{sorted(self.before)}; measure the same domains every time"
            )
        unmeasured = [domain for domain in learnt if domain not in self.before]
        if unmeasured:
            raise PeftMoeError(
                f"stage {name!r} learnt {unmeasured}, whose loss was not measured; measure every domain"
            )
        self.stages.append((name, tuple(learnt), dict(losses)))

    def forgetting(self, stage: int = -1) -> dict[str, float]:
        """Return each learnt domain's loss at ``stage`` minus its lowest loss since it was learnt."""
        last = range(len(self.stages))[stage]
        forgotten = {}
        for domain in self.before:
            learnt_in = next((n for n in range(last + 1) if domain in self.stages[n][1]), None)
            if learnt_in is not None:
                losses = [self.stages[n][2][domain] for n in range(learnt_in, last + 1)]
                forgotten[domain] = losses[-1] - min(losses)
        return forgotten

    def backward_transfer(self, stage: int = -1) -> float | None:
        """Return the loss of earlier domains right after they were learnt minus their loss now, on average.

        This is the backward transfer of Lopez-Paz and Ranzato (arXiv 1706.08840), for losses. It is negative
        where later stages did harm, and None in the first stage.
        """
        last = range(len(self.stages))[stage]
        changes = []
        for domain in self.before:
            learnt = [n for n in range(last + 1) if domain in self.stages[n][1]]
            if learnt and learnt[-1] < last:
                changes.append(self.stages[learnt[-1]][2][domain] - self.stages[last][2][domain])
        return sum(changes) / len(changes) if changes else None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return {
            "before": self.before,
            "stages": [
                {
                    "name": name,
                    "learnt": list(learnt),
                    "losses": losses,
                    "forgetting": self.forgetting(n),
                    "backward_transfer": self.backward_transfer(n),
                }
                for n, (name, learnt, losses) in enumerate(self.stages)
            ],
        }

    def table(self) -> str:
        """Return a table of losses per stage and domain; a star marks the domains that the stage learnt."""
        width = max(8, *(len(domain) + 2 for domain in self.before))
        label = max(8, *(len(name) + 1 for name, *_ in self.stages)) if self.stages else 8
        lines = [" " * label + "".join(f"{d:>{width}}" for d in self.before) + f"{'backward':>10}"]
        lines.append(f"{'before':<{label}}" + "".join(f"{v:>{width - 1}.3f} " for v in self.before.values()))
        for number, (name, learnt, losses) in enumerate(self.stages):
            cells = (f"{losses[d]:>{width - 1}.3f}" + ("*" if d in learnt else " ") for d in self.before)
            transfer = self.backward_transfer(number)
            lines.append(
                f"{name:<{label}}" + "".join(cells) + ("" if transfer is None else f"{transfer:>+10.3f}")
            )
        if self.stages:
            forgotten = self.forgetting()
            cells = (
                f"{forgotten[d]:>+{width - 1}.3f} " if d in forgotten else " " * width for d in self.before
            )
            lines.append(f"{'forgot':<{label}}" + "".join(cells))
        return "\n".join(lines)

    def save(self, folder: Path) -> None:
        """Write ``forgetting.json`` and ``forgetting.png``; readers never see an incomplete file."""
        write_json(folder / "forgetting.json", self.to_dict(), indent=1)
        replace_file(folder / "forgetting.png", self.plot)

    def plot(self, path: Path) -> None:
        """Write a PNG with one line per domain over the stages, and a dot where it was learnt."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(2.5 + 0.9 * len(self.stages), 3.2))
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        for domain, start in self.before.items():
            losses = [start, *(stage[2][domain] for stage in self.stages)]
            (line,) = axis.plot(range(len(losses)), losses, label=domain, linewidth=1.5)
            learnt_in = [n + 1 for n, stage in enumerate(self.stages) if domain in stage[1]]
            axis.plot(learnt_in, [losses[n] for n in learnt_in], "o", color=line.get_color())
        names = ["before", *(stage[0] for stage in self.stages)]
        axis.set_xticks(range(len(names)), names, fontsize=8, rotation=30, ha="right")
        axis.set_ylabel("held-out loss, nats per token", fontsize=8)
        axis.legend(fontsize=7, frameon=False)
        axis.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(path, dpi=120, format="png")
