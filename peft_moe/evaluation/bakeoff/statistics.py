"""Shares of the oracle's gain with bootstrap intervals, paired over texts: pure numpy.

A bootstrap draw resamples the texts of every row; the base, the oracle and all methods see the same
draw, so that what makes a text hard cancels out. Draw 0 is the data as they are: every array over
draws carries the estimate itself in place 0.

Letters: D draws, N texts of a row, S seeds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def differs_from_zero(self) -> bool:
        """Whether the interval leaves zero out. NaN does not differ."""
        return self.low > 0 or self.high < 0

    def scaled(self, factor: float) -> Estimate:
        """In other units (``factor`` > 0)."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor)


def draw_texts(texts: int, draws: int, rng: np.random.Generator) -> Array:
    """How often each text occurs in each draw.

    Returns:
        [D + 1, N]; row 0 is all ones, every row sums to N.
    """
    counts_DN = rng.multinomial(texts, np.full(texts, 1.0 / texts), size=draws).astype(np.float64)
    return np.vstack([np.ones((1, texts)), counts_DN])


def draw_seeds(seeds: int, draws: int, rng: np.random.Generator) -> Array:
    """The weight of each seed in each draw.

    S - 1 of S seeds are drawn: drawing S would make the variance of their mean too small by (S-1)/S,
    which is a third for three seeds (Rao and Wu, 1988, JASA 83:231).

    Returns:
        [D + 1, S]; rows sum to 1, row 0 is 1/S.
    """
    even_S = np.full(seeds, 1.0 / seeds)
    if seeds == 1:
        return np.ones((draws + 1, 1))
    drawn_DS = rng.multinomial(seeds - 1, even_S, size=draws) / (seeds - 1)
    return np.vstack([even_S, drawn_DS])


def ratio(counts_DN: Array, above_SN: Array, below_SN: Array) -> Array:
    """Σ above / Σ below over the texts of each draw: a loss per token, or a share of exact answers.

    Args:
        counts_DN: of :func:`draw_texts`.
        above_SN: for each seed and text, such as its summed negative log-likelihood.
        below_SN: such as its number of tokens.

    Returns:
        [D, S]; NaN where there is nothing to divide by.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        quotient_DS: Array = (counts_DN @ above_SN.T) / (counts_DN @ below_SN.T)
    return quotient_DS


def share(method_DS: Array, base_DS: Array, oracle_DS: Array) -> Array:
    """Share of the oracle's gain over the base that a method keeps, [D, S]: 1 for the oracle, 0 for the base.

    Base and oracle have one seed, [D, 1]. For losses and for accuracies alike; NaN where the oracle gains
    nothing.
    """
    gain_DS = oracle_DS - base_DS
    with np.errstate(invalid="ignore", divide="ignore"):
        kept_DS: Array = np.where(gain_DS == 0, np.nan, (method_DS - base_DS) / gain_DS)
    return kept_DS


def over_seeds(values_DS: Array, weights_DS: Array) -> Array:
    """Mean over the drawn seeds, [D]."""
    mean_D: Array = (values_DS * weights_DS).sum(axis=1)
    return mean_D


def estimate(values_D: Array, level: float = 0.95) -> Estimate:
    """The percentile interval of an array over draws, around its place 0."""
    drawn = values_D[1:][np.isfinite(values_D[1:])]
    if not np.isfinite(values_D[0]) or len(drawn) == 0:
        return Estimate(float(values_D[0]), float("nan"), float("nan"))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(values_D[0]), float(low), float(high))
