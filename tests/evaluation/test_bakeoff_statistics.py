"""The bake-off's statistics: exact where they can be, and intervals that hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from peft_moe.evaluation.bakeoff.statistics import (
    Estimate,
    draw_seeds,
    draw_texts,
    estimate,
    over_seeds,
    ratio,
    share,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_draws_of_texts_begin_with_the_data_themselves(rng) -> None:
    counts = draw_texts(7, 50, rng)
    assert counts.shape == (51, 7)
    assert (counts[0] == 1).all()
    assert (counts.sum(axis=1) == 7).all()
    assert (
        (counts[1:] != 1).any(axis=1).all()
    )  # all 50 differ from it; the chance of one that does not: 0.6 %


def test_seeds_are_drawn_with_the_variance_of_their_mean(rng) -> None:
    values = np.array([0.1, 0.5, 0.9])
    weights = draw_seeds(3, 40_000, rng)
    assert weights[0] == pytest.approx([1 / 3] * 3)
    assert np.allclose(weights.sum(axis=1), 1)
    # s²/n without bias; drawing 3 of 3 would give two thirds of it. 40,000 draws: 1 % of noise.
    assert np.var(weights[1:] @ values) == pytest.approx(np.var(values, ddof=1) / 3, rel=0.03)


def test_one_seed_has_weight_one(rng) -> None:
    assert (draw_seeds(1, 5, rng) == 1).all()


def test_ratio_is_the_weighted_quotient_of_each_seed() -> None:
    counts = np.array([[1.0, 1.0, 1.0], [2.0, 0.0, 1.0]])
    nll = np.array([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0]])
    tokens = np.array([[1.0, 1.0, 2.0], [1.0, 1.0, 2.0]])
    assert ratio(counts, nll, tokens).tolist() == [[6 / 4, 6 / 4], [5 / 4, 6 / 4]]


def test_ratio_of_nothing_is_nan() -> None:
    assert np.isnan(ratio(np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]]), np.array([[1.0, 0.0]]))).all()


@pytest.mark.parametrize(("base", "oracle"), [(4.0, 3.0), (0.1, 0.9)], ids=["losses", "accuracies"])
def test_share_is_0_for_the_base_and_1_for_the_oracle(base, oracle) -> None:
    def kept(value: float) -> float:
        return float(share(np.array([[value]]), np.array([[base]]), np.array([[oracle]]))[0, 0])

    assert (kept(base), kept(oracle)) == (0.0, 1.0)
    assert kept((base + oracle) / 2) == pytest.approx(0.5)
    assert kept(base - (oracle - base)) == pytest.approx(-1.0)


def test_no_share_where_the_oracle_gains_nothing() -> None:
    assert np.isnan(share(np.array([[1.0]]), np.array([[2.0]]), np.array([[2.0]]))).all()


def test_estimate_takes_quantiles_of_the_draws_and_the_value_of_the_data() -> None:
    values = np.concatenate([[-5.0], np.arange(101.0)])
    found = estimate(values, level=0.9)
    assert (found.value, found.low, found.high) == pytest.approx((-5.0, 5.0, 95.0))


def test_an_interval_that_touches_zero_does_not_differ_from_it() -> None:
    assert Estimate(0.1, 0.01, 0.2).differs_from_zero
    assert Estimate(-0.1, -0.2, -0.01).differs_from_zero
    assert not Estimate(0.1, 0.0, 0.2).differs_from_zero
    assert not Estimate(float("nan"), float("nan"), float("nan")).differs_from_zero


def test_pairing_takes_the_hardness_of_texts_out(rng) -> None:
    """A method that keeps half of every text's gain keeps half, in every draw."""
    base = rng.gamma(2.0, 30.0, size=(1, 40))
    oracle = base * rng.uniform(0.5, 0.9, size=(1, 40))
    tokens = rng.integers(5, 50, size=(1, 40)).astype(float)
    counts = draw_texts(40, 300, rng)
    of = [ratio(counts, nll, tokens) for nll in ((base + oracle) / 2, base, oracle)]
    half = estimate(share(*of)[:, 0])
    assert (half.low, half.value, half.high) == pytest.approx((0.5, 0.5, 0.5), abs=1e-12)


def test_intervals_cover_the_truth(rng) -> None:
    """Texts drawn from a known world in which the method keeps 60 % of the gain."""
    covered = 0
    for _ in range(200):
        base = rng.normal(60.0, 15.0, size=(1, 50))
        gain = rng.normal(12.0, 5.0, size=(1, 50))
        method = base - 0.6 * gain + rng.normal(0.0, 4.0, size=(1, 50))
        tokens = np.full((1, 50), 20.0)
        counts = draw_texts(50, 300, rng)
        kept = share(
            ratio(counts, method, tokens), ratio(counts, base, tokens), ratio(counts, base - gain, tokens)
        )
        found = estimate(kept[:, 0])
        covered += found.low <= 0.6 <= found.high
    # 95 % promised; percentile intervals of 50 texts are a little short. 200 worlds: ±3 % of noise.
    assert 0.89 <= covered / 200 <= 0.99


def test_intervals_widen_with_the_spread_of_seeds(rng) -> None:
    counts, weights = draw_texts(50, 500, rng), draw_seeds(3, 500, rng)
    base, tokens = rng.normal(60.0, 15.0, size=(1, 50)), np.full((1, 50), 20.0)

    def width(spread: float) -> float:
        runs = np.vstack([base - 6.0 + spread * k for k in (-1, 0, 1)])
        kept = share(
            ratio(counts, runs, tokens), ratio(counts, base, tokens), ratio(counts, base - 12, tokens)
        )
        found = estimate(over_seeds(kept, weights))
        return found.high - found.low

    assert width(0.0) == pytest.approx(0.0, abs=1e-9)
    assert width(2.0) > 0.1
