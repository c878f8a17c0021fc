"""What is kept and what is lost while a model learns one domain after the other.

Every figure is a loss in nats, so that above 0 means forgotten and below 0 gained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import PeftMoeError


@dataclass
class ForgettingReport:
    """Held-out losses of all domains after every stage.

    Args:
        before: loss of each domain before the first stage.
    """

    before: dict[str, float]
    stages: list[tuple[str, tuple[str, ...], dict[str, float]]] = field(default_factory=list)

    def add_stage(self, name: str, learnt: Sequence[str], losses: Mapping[str, float]) -> None:
        """A stage is done.

        Args:
            name: of the stage.
            learnt: the domains that it trained on.
            losses: of every domain.

        Raises:
            PeftMoeError: the domains are not those of the first measurement.
        """
        if set(losses) != set(self.before):
            raise PeftMoeError(
                f"stage {name!r}: losses of {sorted(losses)}, and the report began with "
                f"{sorted(self.before)}; measure the same domains every time"
            )
        strangers = [domain for domain in learnt if domain not in self.before]
        if strangers:
            raise PeftMoeError(
                f"stage {name!r} learnt {strangers}, of which nothing was measured; measure every domain"
            )
        self.stages.append((name, tuple(learnt), dict(losses)))

    def forgetting(self, stage: int = -1) -> dict[str, float]:
        """Of each domain learnt up to ``stage``: its loss, less its lowest one since it was learnt."""
        last = range(len(self.stages))[stage]
        found = {}
        for domain in self.before:
            first = next((n for n in range(last + 1) if domain in self.stages[n][1]), None)
            if first is not None:
                losses = [self.stages[n][2][domain] for n in range(first, last + 1)]
                found[domain] = losses[-1] - min(losses)
        return found

    def backward_transfer(self, stage: int = -1) -> float | None:
        """Mean over domains learnt in earlier stages: loss right after they were learnt, less that now.

        Lopez-Paz and Ranzato's (arXiv 1706.08840), of losses: below 0 where later stages did harm. None in
        the first stage.
        """
        last = range(len(self.stages))[stage]
        changes = []
        for domain in self.before:
            learnt = [n for n in range(last + 1) if domain in self.stages[n][1]]
            if learnt and learnt[-1] < last:
                changes.append(self.stages[learnt[-1]][2][domain] - self.stages[last][2][domain])
        return sum(changes) / len(changes) if changes else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
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
        """Losses of every domain (columns) after every stage (rows); a star marks what the stage learnt."""
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
            lost = self.forgetting()
            cells = (f"{lost[d]:>+{width - 1}.3f} " if d in lost else " " * width for d in self.before)
            lines.append(f"{'forgot':<{label}}" + "".join(cells))
        return "\n".join(lines)

    def save(self, folder: Path) -> None:
        """Write ``forgetting.json`` and ``forgetting.png``, each beside and renamed."""
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "forgetting.part.json"
        part.write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")
        part.replace(folder / "forgetting.json")
        part = folder / "forgetting.part.png"
        self.plot(part)
        part.replace(folder / "forgetting.png")

    def plot(self, path: Path) -> None:
        """One line per domain over the stages, with a dot where it was learnt."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(2.5 + 0.9 * len(self.stages), 3.2))
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        for domain, start in self.before.items():
            losses = [start, *(stage[2][domain] for stage in self.stages)]
            (line,) = axis.plot(range(len(losses)), losses, label=domain, linewidth=1.5)
            places = [n + 1 for n, stage in enumerate(self.stages) if domain in stage[1]]
            axis.plot(places, [losses[n] for n in places], "o", color=line.get_color())
        names = ["before", *(stage[0] for stage in self.stages)]
        axis.set_xticks(range(len(names)), names, fontsize=8, rotation=30, ha="right")
        axis.set_ylabel("held-out loss, nats per token", fontsize=8)
        axis.legend(fontsize=7, frameon=False)
        axis.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(path, dpi=120)
