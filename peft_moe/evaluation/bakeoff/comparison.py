"""From scores to results: each method's numbers with intervals, and differences between methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..score import TurnScore
from .build import Cost
from .methods import BASE, EFFORT, ORACLE, REFERENCE, Method
from .records import Record, Scores
from .statistics import Array, Estimate, draw_seeds, draw_texts, estimate, over_seeds, ratio, share
from .texts import Row

MEAN = "mean"


@dataclass
class MethodResult:
    """The result of one method under one measure.

    Attributes:
        name, group: those of the method.
        seeds: number of seeds it ran with.
        values: row → loss, or share of exact answers.
        shares: row with experts → share of the oracle's gain over the base. `MEAN` is the mean over the
            experts' domains.
        changes: row without an expert → relative change of the loss against the base, or change of the
            share of exact answers.
        cost: means over seeds.
        draws: row or `MEAN` → its share or change in every bootstrap draw, for differences.
    """

    name: str
    group: str
    seeds: int
    values: dict[str, Estimate] = field(default_factory=dict)
    shares: dict[str, Estimate] = field(default_factory=dict)
    changes: dict[str, Estimate] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    draws: dict[str, Array] = field(default_factory=dict)


def oracle_scores(records: Mapping[str, Sequence[Record]], rows: Sequence[Row]) -> Scores:
    """Return for each turn the score of its domain's expert, run over the whole text, or else of the base."""
    return {
        row.name: [
            [records[owner or BASE][0].scores[row.name][text][turn] for turn, owner in enumerate(owners)]
            for text, owners in enumerate(row.owners)
        ]
        for row in rows
    }


class Comparison:
    """The results of all methods on the same bootstrap draws.

    Args:
        methods: methods with scores, the base among them.
        records: method name → one record per seed.
        rows: the rows of texts that were scored.
        measure: "loss" or "exact".
        draws: number of bootstrap resamples.
    """

    def __init__(
        self,
        methods: Sequence[Method],
        records: Mapping[str, Sequence[Record]],
        rows: Sequence[Row],
        measure: str,
        draws: int,
    ) -> None:
        self.rows, self.measure, self.number = rows, measure, draws
        self.rng = np.random.default_rng(0)
        self.counts = {row.name: draw_texts(len(row.texts), draws, self.rng) for row in rows}
        self.weights: dict[int, Array] = {}
        self.base = self._values([records[BASE][0].scores])
        best = oracle_scores(records, rows)
        self.oracle = self._values([best])
        self.results: dict[str, MethodResult] = {}
        for method in methods:
            runs = records[method.name]
            self._add(method.name, method.group, [run.scores for run in runs], [run.cost for run in runs])
        self._add(ORACLE, REFERENCE, [best], [])

    @property
    def gainful(self) -> list[str]:
        """The experts' domains in which the oracle is better than the base."""
        return [r.name for r in self.rows if r.kind == "expert" and self._oracle_gains(r.name)]

    def _oracle_gains(self, row: str) -> bool:
        gain = float(self.oracle[row][0, 0] - self.base[row][0, 0])
        return gain < 0 if self.measure == "loss" else gain > 0

    def _values(self, runs: Sequence[Scores]) -> dict[str, Array]:
        values = {}
        for row in self.rows:
            above, below = zip(*(_sums(scores[row.name], self.measure) for scores in runs), strict=True)
            values[row.name] = ratio(self.counts[row.name], np.stack(above), np.stack(below))
        return values

    def _seed_weights(self, seeds: int) -> Array:
        # Methods with equally many seeds share their draws, since a seed fixes the order of samples for all.
        if seeds not in self.weights:
            self.weights[seeds] = draw_seeds(seeds, self.number, self.rng)
        return self.weights[seeds]

    def _add(self, name: str, group: str, runs: Sequence[Scores], costs: Sequence[Cost]) -> None:
        values, weights = self._values(runs), self._seed_weights(len(runs))
        result = MethodResult(name, group, len(runs), cost=_mean_cost(costs))
        for row in self.rows:
            value_DS, base_DS = values[row.name], self.base[row.name]
            result.values[row.name] = estimate(over_seeds(value_DS, weights))
            if row.kind in ("expert", "mixed"):
                share_D = over_seeds(share(value_DS, base_DS, self.oracle[row.name]), weights)
                result.draws[row.name] = share_D
                result.shares[row.name] = estimate(share_D)
            else:
                change_DS = value_DS / base_DS - 1 if self.measure == "loss" else value_DS - base_DS
                result.draws[row.name] = over_seeds(change_DS, weights)
                result.changes[row.name] = estimate(result.draws[row.name])
        if self.gainful:
            result.draws[MEAN] = np.mean([result.draws[row] for row in self.gainful], axis=0)
            result.shares[MEAN] = estimate(result.draws[MEAN])
        self.results[name] = result

    def difference(self, method: str, other: str, row: str = MEAN) -> Estimate:
        """Return the share of ``method`` minus that of ``other``, paired over texts and seeds."""
        return estimate(self.results[method].draws[row] - self.results[other].draws[row])

    def ranked(self, group: str | None = None, row: str = MEAN) -> list[MethodResult]:
        """Return the methods of a group, or of all groups but the references, best share first."""
        groups = EFFORT if group is None else (group,)
        results = [r for r in self.results.values() if r.group in groups and row in r.shares]
        return sorted(results, key=lambda r: -np.nan_to_num(r.shares[row].value, nan=-np.inf))


def _sums(texts: Sequence[Sequence[TurnScore]], measure: str) -> tuple[Array, Array]:
    """Return numerator and denominator of the measure per text. Turns without tokens were cut off."""
    complete = [[turn for turn in turns if turn.tokens] for turns in texts]
    if measure == "loss":
        above = [sum(turn.nll for turn in turns) for turns in complete]
        below = [sum(turn.tokens for turn in turns) for turns in complete]
    else:
        above = [float(sum(turn.exact for turn in turns)) for turns in complete]
        below = [len(turns) for turns in complete]
    return np.array(above, dtype=np.float64), np.array(below, dtype=np.float64)


def _mean_cost(costs: Sequence[Cost]) -> Cost:
    if not costs:
        return Cost()
    return Cost(
        trainable=costs[0].trainable,
        seconds=float(np.mean([cost.seconds for cost in costs])),
        tokens_per_second=float(np.mean([cost.tokens_per_second for cost in costs])),
    )
