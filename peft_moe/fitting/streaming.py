"""Streaming fit: the texts are read once per group of routers, and only statistics of constant size remain.

The routers of a group are limited by memory, see ``StreamSettings.max_bytes``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..routers import Router, Scorer
from .router_inputs import InputReader
from .solvers import Values, accuracy
from .sufficient_statistics import InputStatistics
from .token_rows import TokenRows

Solver = Callable[[Scorer, InputStatistics, float], Values]


@dataclass(frozen=True)
class StreamSettings:
    """How texts are read, and what is computed from them.

    Attributes:
        gram: whether the solver needs Σ h·hᵀ.
        keep: largest number of sampled rows per router.
        seed: of the sample, and of every other draw.
        max_bytes: largest size of the statistics of all routers that are read in one pass.
        batch_size: texts per call of the base.
        progress: whether to show bars.
    """

    gram: bool
    keep: int
    seed: int
    max_bytes: int
    batch_size: int
    progress: bool

    def groups(self, routers: Mapping[str, Router], labels: int) -> list[dict[str, Router]]:
        """Divide the routers into groups: as many per group as fit into ``max_bytes``, and one at least."""
        groups: list[dict[str, Router]] = []
        used = 0
        for name, router in routers.items():
            size = InputStatistics.num_bytes(router.in_features, labels, gram=self.gram, keep=self.keep)
            if not groups or used + size > self.max_bytes:
                groups.append({})
                used = 0
            groups[-1][name] = router
            used += size
        return groups


@dataclass
class Fitted:
    """The solutions of a fit, which are not yet written into the routers.

    Attributes:
        values: new parameters of each router, by name.
        accuracies: share of sampled rows whose highest score is at their label, by router.
        samples: rows that the last router was given.
        kept: rows in that router's sample.
        passes: number of times that the texts were read.
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
    settings: StreamSettings,
    solve: Solver | None,
    strength: float,
) -> Fitted:
    """Read the texts and solve for every router.

    Args:
        reader: reads the routers' inputs.
        routers: the routers to fit, by name.
        rows: the texts.
        settings: how the texts are read.
        solve: the solver; None measures the accuracy of the routers' present values.
        strength: weight of the solver's penalty.
    """
    fitted = Fitted()
    columns = next(iter(routers.values())).settings.num_columns
    labels = columns * (2 if any(label >= columns for label in rows.labels) else 1)  # negative examples
    groups = settings.groups(routers, labels)
    for number, group in enumerate(groups):
        statistics = {
            name: InputStatistics(
                router.in_features, labels, gram=settings.gram, keep=settings.keep, seed=settings.seed
            )
            for name, router in group.items()
        }

        # The default binds this group's statistics, not those of a later group.
        def consume(
            name: str,
            features_NI: Tensor,
            labels_N: Tensor,
            statistics: dict[str, InputStatistics] = statistics,
        ) -> None:
            statistics[name].add(features_NI, labels_N)

        title = "Reading texts" + (f" ({number + 1} of {len(groups)})" if len(groups) > 1 else "")
        reader.stream(
            group, rows, consume, batch_size=settings.batch_size, progress=settings.progress, title=title
        )
        fitted.passes += 1
        for name, router in group.items():
            inputs = statistics.pop(name)  # frees its memory before the next router is solved
            values = solve(router.scorer, inputs, strength) if solve is not None else {}
            fitted.values[name] = values
            fitted.accuracies[name] = accuracy(router.scorer, values, inputs)
            fitted.samples, fitted.kept = int(inputs.counts.sum()), len(inputs.sample()[1])
    return fitted
