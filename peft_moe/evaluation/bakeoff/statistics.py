"""Shares of the oracle's gain with bootstrap intervals, paired over texts: pure numpy.

A bootstrap draw resamples the texts of every row. The base, the oracle and all methods use the same draws,
so that the difficulty of a text cancels out. Draw 0 is the original data: every array over draws holds the
estimate itself at index 0.

Letters: D draws, N texts of a row, S seeds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def differs_from_zero(self) -> bool:
        """Whether the interval excludes zero; False for NaN."""
        return self.low > 0 or self.high < 0

    def scaled(self, factor: float) -> Estimate:
        """Return the estimate in other units (``factor`` > 0)."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor)


def draw_texts(texts: int, draws: int, rng: np.random.Generator) -> Array:
    """Draw how often each text occurs in each bootstrap draw.

    Returns:
        Counts [D + 1, N]; row 0 is all ones, every row sums to N.
    """
    counts_DN = rng.multinomial(texts, np.full(texts, 1.0 / texts), size=draws).astype(np.float64)
    return np.vstack([np.ones((1, texts)), counts_DN])


def draw_seeds(seeds: int, draws: int, rng: np.random.Generator) -> Array:
    """Draw the weight of each seed in each bootstrap draw.

    A draw takes S - 1 of S seeds. Taking S would make the variance of their mean too small by the factor
    (S-1)/S, which is 2/3 for three seeds (Rao and Wu, 1988, JASA 83:231).

    Returns:
        Weights [D + 1, S]; rows sum to 1, row 0 is 1/S.
    """
    even_S = np.full(seeds, 1.0 / seeds)
    if seeds == 1:
        return np.ones((draws + 1, 1))
    drawn_DS = rng.multinomial(seeds - 1, even_S, size=draws) / (seeds - 1)
    return np.vstack([even_S, drawn_DS])


def ratio(counts_DN: Array, above_SN: Array, below_SN: Array) -> Array:
    """Return Σ above / Σ below over the texts of each draw: a loss per token, or a share of exact answers.

    Args:
        counts_DN: counts from :func:`draw_texts`.
        above_SN: numerator of each seed and text, such as its summed negative log-likelihood.
        below_SN: denominator, such as its number of tokens.

    Returns:
        Ratios [D, S]; NaN where the denominator is 0.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        quotient_DS: Array = (counts_DN @ above_SN.T) / (counts_DN @ below_SN.T)
    return quotient_DS


def share(method_DS: Array, base_DS: Array, oracle_DS: Array) -> Array:
    """Return a method's share of the oracle's gain over the base, [D, S]: 1 for the oracle, 0 for the base.

    Base and oracle have one seed, [D, 1]. The values are losses or accuracies. The share is NaN where the
    oracle gains nothing.
    """
    gain_DS = oracle_DS - base_DS
    with np.errstate(invalid="ignore", divide="ignore"):
        share_DS: Array = np.where(gain_DS == 0, np.nan, (method_DS - base_DS) / gain_DS)
    return share_DS


def over_seeds(values_DS: Array, weights_DS: Array) -> Array:
    """Return the mean over the drawn seeds, [D]."""
    mean_D: Array = (values_DS * weights_DS).sum(axis=1)
    return mean_D


def estimate(values_D: Array, level: float = 0.95) -> Estimate:
    """Return the value at index 0 of an array over draws, with the percentile interval of the other draws."""
    drawn = values_D[1:][np.isfinite(values_D[1:])]
    if not np.isfinite(values_D[0]) or len(drawn) == 0:
        return Estimate(float(values_D[0]), float("nan"), float("nan"))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(values_D[0]), float(low), float(high))
