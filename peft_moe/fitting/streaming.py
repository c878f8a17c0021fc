"""Fitting many routers from texts that are read once per group of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..routers import Router, Scorer
from .router_inputs import InputReader
from .solvers import Values, accuracy
from .sufficient_statistics import Inputs
from .token_rows import TokenRows

Solver = Callable[[Scorer, Inputs, float], Values]


@dataclass(frozen=True)
class Plan:
    """How texts are read.

    Attributes:
        gram: whether Σ h·hᵀ is wanted.
        keep: rows that each router keeps.
        seed: of the choice of those rows, and of whatever else is drawn.
        limit: bytes that the routers of one pass may keep.
        batch_size: texts per pass through the base.
        progress: whether to show bars.
    """

    gram: bool
    keep: int
    seed: int
    limit: int
    batch_size: int
    progress: bool

    def groups(self, routers: Mapping[str, Router], labels: int) -> list[dict[str, Router]]:
        """Routers that are read in one pass: as many as fit under the limit, and one at least."""
        found: list[dict[str, Router]] = []
        used = 0
        for name, router in routers.items():
            size = Inputs.num_bytes(router.in_features, labels, gram=self.gram, keep=self.keep)
            if not found or used + size > self.limit:
                found.append({})
                used = 0
            found[-1][name] = router
            used += size
        return found


@dataclass
class Fitted:
    """What became of the routers; nothing is written into them yet.

    Attributes:
        values: new parameters, by router.
        accuracies: share of kept rows that go where their label says, by router.
        samples: rows that the last router saw.
        kept: rows that it kept.
        passes: how often the texts were read.
    """

    values: dict[str, Values] = field(default_factory=dict)
    accuracies: dict[str, float] = field(default_factory=dict)
    samples: int = 0
    kept: int = 0
    passes: int = 0


def fit_streamed(
    reader: InputReader,
    routers: Mapping[str, Router],
    rows: TokenRows,
    plan: Plan,
    solve: Solver | None,
    strength: float,
) -> Fitted:
    """Read the texts and solve for every router; without a solver only measure them as they are.

    Args:
        reader: hands out the routers' inputs.
        routers: to fit, by name.
        rows: the texts.
        plan: how they are read.
        solve: from inputs to values.
        strength: of the penalty, for the solver.
    """
    fitted = Fitted()
    columns = next(iter(routers.values())).settings.num_columns
    labels = columns * (2 if any(label >= columns for label in rows.labels) else 1)  # negative examples
    groups = plan.groups(routers, labels)
    for number, group in enumerate(groups):
        seen = {
            name: Inputs(router.in_features, labels, gram=plan.gram, keep=plan.keep, seed=plan.seed)
            for name, router in group.items()
        }

        def take(name: str, features_NI: Tensor, labels_N: Tensor, seen: dict[str, Inputs] = seen) -> None:
            seen[name].add(features_NI, labels_N)

        title = "Reading texts" + (f" ({number + 1} of {len(groups)})" if len(groups) > 1 else "")
        reader.stream(group, rows, take, batch_size=plan.batch_size, progress=plan.progress, title=title)
        fitted.passes += 1
        for name, router in group.items():
            inputs = seen.pop(name)  # let go of one before the next is solved
            values = solve(router.scorer, inputs, strength) if solve is not None else {}
            fitted.values[name] = values
            fitted.accuracies[name] = accuracy(router.scorer, values, inputs)
            fitted.samples, fitted.kept = int(inputs.counts.sum()), len(inputs.sample()[1])
    return fitted
