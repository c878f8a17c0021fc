"""Times of several variants, which take turns in one process.

The clock is the CPU time of one thread: other programs on the machine then affect the caches only. A short
call follows an uncounted call of the same variant. Without that, it would pay for the caches and the heap
that the variant before it left behind, up to a tenth of a layer. Ratios are taken within a round, between
calls close in time, and then summarised.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Times = dict[str, list[float]]
# Seconds. Longer calls are not repeated: the effect is small there, and the suite must stay short.
_SHORT = 0.03


@dataclass(frozen=True)
class Variant:
    """A timed call, and the untimed preparation before it."""

    run: Callable[[], object]
    before: Callable[[], object] | None = None


@dataclass(frozen=True)
class Spread:
    """The lower quartile, the median and the upper quartile."""

    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.low:.2f}–{self.high:.2f})"


def spread(values: list[float]) -> Spread:
    """Summarise at least two values."""
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


def interleave(
    variants: Mapping[str, Variant], *, budget: float, fewest: int = 5, most: int = 25, inner: int = 1
) -> Times:
    """Return the seconds per call of every variant, one entry per round.

    Args:
        variants: variants by name. Every round runs all of them; each round starts with the next variant.
        budget: CPU seconds of all rounds together. A first, uncounted round warms up and measures how many
            rounds fit.
        fewest, most: bounds of the number of rounds.
        inner: calls per entry, for calls too short for the clock.
    """
    names = list(variants)
    start = time.process_time()
    short = {name for name in names if inner * _once(variants[name], inner) < _SHORT}
    spent = time.process_time() - start
    # The uncounted calls use up part of the budget.
    rounds = int(budget / max(spent * (2 if len(short) > len(names) / 2 else 1), 1e-6))
    times: Times = {name: [] for name in names}
    for number in range(min(max(rounds, fewest), most)):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            if name in short:
                _once(variants[name], inner)
            times[name].append(_once(variants[name], inner))
    return times


def ratios(times: Times, name: str, to: str) -> Spread:
    """Return the ratio of two variants' times, round by round."""
    return spread([a / b for a, b in zip(times[name], times[to], strict=True)])


def _once(variant: Variant, inner: int) -> float:
    if variant.before is not None:
        variant.before()
    start = time.thread_time()
    for _ in range(inner):
        variant.run()
    return (time.thread_time() - start) / inner
