"""Scorers from prototypes and from the experts' weights, against plain float64 computations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_moe.routers import RouterSettings, scorer_class, select
from peft_moe.routers.scorers.prototypes import short_factor, top_direction

WIDTH, OUT = 12, 7
# An absent expert, one of a single rank, one of more ranks than outputs, one of more than inputs.
RANKS = (3, 0, 1, 9, 14)
SCALING = (2.0, 1.0, 0.5, 0.1, 3.0)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return drawn(sum(RANKS), WIDTH, seed=1).to(dtype), drawn(sum(RANKS), OUT, seed=2).to(dtype)


def deltas(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """s·B·A of each expert, [O, I]."""
    A_e, B_e = (factor.double().split(RANKS) for factor in factors(dtype))
    return [s * B.T @ A for s, A, B in zip(SCALING, A_e, B_e, strict=True)]


def scorer(name: str, *, dtype: torch.dtype = torch.float64, **fields):
    made = scorer_class(name)(RouterSettings(name, num_experts=len(RANKS), **fields), WIDTH)
    made.expect_experts(RANKS)
    if made.reads_experts:
        made.read_experts(*factors(dtype), RANKS, SCALING)
    return made


# The scorers keep their weights in float32.
CLOSE = {"atol": 1e-6, "rtol": 1e-5}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_arrow_is_the_top_right_singular_vector_of_the_dense_product(dtype):
    x = drawn(2, 5, WIDTH, seed=3)
    found = scorer("arrow", dtype=dtype)(x)
    for expert, delta in enumerate(deltas(dtype)):
        if RANKS[expert]:
            top = torch.linalg.svd(delta).Vh[0]
            torch.testing.assert_close(found[..., expert], (x @ top).abs(), **CLOSE)


@pytest.mark.parametrize("name", ["spectr", "spectr_unit"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_spectr_is_the_norm_of_what_the_expert_adds(name, dtype):
    x = drawn(2, 5, WIDTH, seed=3)
    found = scorer(name, dtype=dtype)(x)
    for expert, delta in enumerate(deltas(dtype)):
        if RANKS[expert]:
            wanted = (x @ delta.T).norm(dim=-1)
            wanted = wanted / delta.norm() if name == "spectr_unit" else wanted
            torch.testing.assert_close(found[..., expert], wanted, **CLOSE)


@pytest.mark.parametrize("name", ["arrow", "spectr", "spectr_unit"])
def test_absent_experts_come_last_and_the_null_expert_second_last(name):
    made = scorer(name, null_expert=True)
    scores = made(drawn(1, 6, WIDTH, seed=3))
    assert scores.shape == (1, 6, len(RANKS) + 1)
    assert (scores[..., -1] == 0).all()
    assert (scores[..., :-1].argmin(-1) == 1).all()  # the expert of rank 0
    assert (scores[..., 1] < scores[..., -1]).all()
    assert (select(scores, made.settings).gates[..., 1] == 0).all()


@pytest.mark.parametrize("name", ["arrow", "spectr"])
def test_shared_experts_have_no_column(name):
    whole, part = scorer(name), scorer(name, shared=(0, 3))
    x = drawn(1, 4, WIDTH, seed=3)
    torch.testing.assert_close(part(x), whole(x)[..., [1, 2, 4]])


def test_high_norms_win_in_spectr_only():
    x = drawn(1, 50, WIDTH, seed=3)
    norms = torch.stack([delta.norm() for delta in deltas()])
    wins = {}
    for name in ("spectr", "spectr_unit"):
        wins[name] = scorer(name)(x).argmax(-1).flatten().bincount(minlength=5)
    assert wins["spectr"].argmax() == norms.argmax()
    assert wins["spectr"].max() > 45
    assert wins["spectr_unit"].max() < 45


def test_experts_that_move_nothing_count_as_absent():
    made = scorer_class("arrow")(RouterSettings("arrow", num_experts=2), WIDTH)
    A, B = drawn(4, WIDTH), torch.cat([drawn(2, OUT), torch.zeros(2, OUT, dtype=torch.float64)])
    made.read_experts(A, B, (2, 2), (1.0, 1.0))
    scores = made(drawn(1, 3, WIDTH))
    assert (scores[..., 0] >= 0).all()
    assert (scores[..., 1] < 0).all()


def test_the_direction_is_cheap_and_of_unit_length():
    A, B = drawn(4, 2000, seed=5), drawn(4, 3000, seed=6)  # the product itself would be 48 MB
    top = top_direction(A, B)
    torch.testing.assert_close(top.norm(), torch.ones((), dtype=torch.float64))
    assert top[top.abs().argmax()] > 0
    # No other direction is amplified more: power iteration from it stays where it is.
    again = A.T @ (B @ (B.T @ (A @ top)))
    torch.testing.assert_close(again / again.norm(), top, atol=1e-10, rtol=0)
    assert short_factor(A, B).shape == (4, 2000)


def test_spectr_keeps_one_factor_as_large_as_a():
    made = scorer("spectr")
    assert {key: tuple(value.shape) for key, value in made.state_dict().items()} == {
        "weight": (sum(RANKS), WIDTH)
    }
    other = scorer_class("spectr")(made.settings, WIDTH)
    other.expect_experts(RANKS)
    other.load_state_dict(made.state_dict())
    x = drawn(1, 4, WIDTH)
    assert torch.equal(other(x), made(x))


def test_centroid_is_a_cosine_from_the_origin():
    made = scorer("centroid", init_std=1.0, null_expert=True)
    x = drawn(2, 3, WIDTH, seed=3)
    origin = drawn(WIDTH, seed=4)
    with torch.no_grad():
        made.origin.copy_(origin)
    weight, origin = made.weight.double(), made.origin.double()
    for b in range(2):
        for t in range(3):
            for e in range(len(RANKS) + 1):
                away = x[b, t] - origin
                wanted = (away @ weight[e]) / (away.norm() * weight[e].norm())
                torch.testing.assert_close(made(x)[b, t, e], wanted, **CLOSE)


def test_zero_prototypes_score_alike_and_can_learn():
    for name in ("centroid", "phatgoose"):
        made = scorer(name)
        scores = made(drawn(1, 3, WIDTH).float())
        assert (scores == 0).all()
        scores[..., 0].sum().backward()
        assert 0 < made.weight.grad.abs().max() < 1e5


def test_phatgoose_compares_standardised_vectors():
    made = scorer("phatgoose", init_std=1.0)
    x = drawn(1, 4, WIDTH, seed=3)

    def standard(v: Tensor) -> Tensor:
        return (v - v.mean()) / (v.var(unbiased=False) + 1e-5).sqrt()

    for t in range(4):
        for e in range(len(RANKS)):
            wanted = standard(x[0, t]) @ standard(made.weight[e].double()) / WIDTH**0.5
            torch.testing.assert_close(made(x)[0, t, e], wanted, **CLOSE)
