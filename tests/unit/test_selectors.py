"""From scores to gates: equalities between forms, ties, straight-through, the null column."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_moe.routers import RouterSettings, select


def chosen(logits, **fields):
    null = bool(fields.get("null_expert", False))
    fields.setdefault("num_experts", logits.shape[-1] - null)
    return select(logits, RouterSettings("linear", **fields))


def scores(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_softmax_topk_renormalise_is_topk_softmax(k):
    logits = scores(3, 5, 5)
    values, ids = logits.topk(k, dim=-1)
    wanted = torch.zeros_like(logits).scatter(-1, ids, torch.softmax(values, dim=-1))
    torch.testing.assert_close(chosen(logits, top_k=k).gates, wanted, atol=1e-15, rtol=1e-13)


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_k_of_all_is_dense(scoring_func):
    logits = scores(2, 3, 4)
    every, dense = (chosen(logits, top_k=k, scoring_func=scoring_func) for k in (4, None))
    assert torch.equal(every.gates, dense.gates)
    assert every.selected is None


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1.0, -1.0]), min_size=6, max_size=6),
    st.integers(1, 5),
    st.sampled_from(["softmax", "sigmoid"]),
    st.booleans(),
)
def test_exactly_k_under_ties(row, k, scoring_func, straight_through):
    routing = chosen(
        torch.tensor([[row]]), top_k=k, scoring_func=scoring_func, straight_through=straight_through
    )
    assert routing.selected.sum().item() == k
    assert (routing.gates > 0).sum().item() == k
    # Nothing that was left out has a higher score than something that was kept.
    kept = routing.selected[0, 0]
    assert torch.tensor(row)[kept].min() >= torch.tensor(row)[~kept].max()


def test_large_sigmoid_scores_keep_their_order():
    # All are 1.0 after a float32 sigmoid.
    routing = chosen(torch.tensor([[[30.0, 90.0, 60.0]]]), top_k=1, scoring_func="sigmoid")
    assert routing.gates.tolist() == [[[0.0, 1.0, 0.0]]]


def test_unnormalised_topk_keeps_its_share_of_the_whole():
    logits = scores(2, 3, 4)
    routing = chosen(logits, top_k=2, norm_topk_prob=False)
    dense = torch.softmax(logits, dim=-1)
    assert torch.equal(routing.gates, torch.where(routing.selected, dense, 0.0))
    assert (routing.gates.sum(-1) < 1).all()


def test_sigmoid_is_normalised_only_when_asked():
    logits = scores(2, 3, 4)
    raw = chosen(logits, scoring_func="sigmoid", norm_topk_prob=False).gates
    assert torch.equal(raw, torch.sigmoid(logits))
    torch.testing.assert_close(
        chosen(logits, scoring_func="sigmoid").gates, raw / raw.sum(-1, keepdim=True), atol=0, rtol=1e-14
    )


def test_vanishing_sigmoid_scores_give_no_nan():
    logits = torch.full((1, 1, 3), -500.0, requires_grad=True)
    gates = chosen(logits, scoring_func="sigmoid").gates
    gates.sum().backward()
    assert gates.tolist() == [[[0.0, 0.0, 0.0]]]
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("null", [True, False])
def test_straight_through_is_hard_forward_and_dense_backward(norm, null):
    hard_in, soft_in, direct = (scores(2, 3, 5).requires_grad_() for _ in range(3))
    options = {"norm_topk_prob": norm, "null_expert": null}
    through = chosen(direct, top_k=1, straight_through=True, **options).gates
    hard = chosen(hard_in, top_k=1, **options).gates
    soft = chosen(soft_in, **options).gates
    assert torch.equal(through, hard)
    direction = scores(*through.shape, seed=1)
    through.backward(direction)
    soft.backward(direction)
    assert direct.grad.abs().max() > 1e-3
    torch.testing.assert_close(direct.grad, soft_in.grad, atol=1e-16, rtol=1e-13)


def test_renormalised_top_1_has_no_gradient():
    # The reason why the config refuses it: every gate is exactly 1.
    logits = scores(2, 3, 4).requires_grad_()
    gates = chosen(logits, top_k=1).gates
    gates.backward(scores(2, 3, 4, seed=1))
    assert set(gates.flatten().tolist()) == {0.0, 1.0}
    assert logits.grad.abs().max() <= 1e-15


def test_null_column_is_dropped_from_gates_and_kept_in_logits():
    logits = scores(2, 3, 4)
    routing = chosen(logits, null_expert=True)
    assert routing.gates.shape == (2, 3, 3)
    assert routing.logits.shape == (2, 3, 4)
    torch.testing.assert_close(routing.gates, torch.softmax(logits, -1)[..., :3])


def test_null_expert_chosen_alone_leaves_no_weight():
    logits = torch.tensor([[[0.0, 1.0, 5.0]]])
    assert chosen(logits, null_expert=True, top_k=1).gates.tolist() == [[[0.0, 0.0]]]


@pytest.mark.parametrize("temperature", [0.25, 4.0])
def test_temperature_divides_the_scores_everywhere(temperature):
    logits = scores(2, 3, 4)
    routing = chosen(logits, temperature=temperature)
    torch.testing.assert_close(routing.gates, torch.softmax(logits / temperature, -1))
    # Losses and reports are to see what the gates were made of.
    torch.testing.assert_close(torch.softmax(routing.logits, -1), routing.gates)


def test_permuted_columns_permute_the_gates():
    logits, order = scores(2, 3, 4), [2, 0, 3, 1]
    for fields in ({}, {"top_k": 2}, {"top_k": 1, "straight_through": True}):
        wanted = chosen(logits, **fields).gates[..., order]
        torch.testing.assert_close(chosen(logits[..., order], **fields).gates, wanted)
