"""Time of several variants, taken turn by turn in one process.

The clock is the CPU time of one thread: other programs on the machine then cost no time, only cache. A short
call follows an uncounted one of the same variant, as in a model that runs by itself: else it would pay for
what its neighbour left in the caches and on the heap, up to a tenth of a layer. Ratios are taken within a
round, between neighbours in time, and only then summarised.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Times = dict[str, list[float]]
# Seconds. What a neighbour leaves behind is a small part of longer calls, and the suite is to end in time.
_SHORT = 0.03


@dataclass(frozen=True)
class Variant:
    """What is timed, and what must be done before each time."""

    run: Callable[[], object]
    before: Callable[[], object] | None = None


@dataclass(frozen=True)
class Spread:
    """Lower quartile, median, upper quartile."""

    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.low:.2f}–{self.high:.2f})"


def spread(values: list[float]) -> Spread:
    """Summary of at least two values."""
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


def interleave(
    variants: Mapping[str, Variant], *, budget: float, fewest: int = 5, most: int = 25, inner: int = 1
) -> Times:
    """Seconds per call of every variant, one entry per round.

    Args:
        variants: by name. Every round runs all of them, each time from the next one on.
        budget: seconds of CPU that the rounds may take together; a first, uncounted round warms up and tells
            how many fit.
        fewest, most: bounds of the number of rounds.
        inner: calls per entry, for calls too short for the clock.
    """
    names = list(variants)
    start = time.process_time()
    short = {name for name in names if inner * _once(variants[name], inner) < _SHORT}
    spent = time.process_time() - start
    # The calls before the counted ones take their share of the budget.
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
    """One variant's time over another's, round by round."""
    return spread([a / b for a, b in zip(times[name], times[to], strict=True)])


def _once(variant: Variant, inner: int) -> float:
    if variant.before is not None:
        variant.before()
    start = time.thread_time()
    for _ in range(inner):
        variant.run()
    return (time.thread_time() - start) / inner
