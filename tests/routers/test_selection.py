"""From scores to gates: equalities between forms, ties, straight-through, the null column."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_moe.routers import RouterSettings, select
from peft_moe.routers.selection import SCORING_FUNCS


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


# The other ways to select.


def test_top_p_keeps_the_fewest_columns_that_reach_the_mass():
    logits = scores(40, 3, 6)
    routing = chosen(logits, topk_method="top_p", top_p=0.7)
    for row, kept in zip(
        torch.softmax(logits, -1).flatten(0, 1), routing.selected.flatten(0, 1), strict=True
    ):
        descending = row.sort(descending=True).values
        wanted = next(n for n in range(1, 7) if descending[:n].sum() >= 0.7)
        assert kept.sum() == wanted
        assert row[kept].min() >= row[~kept].max()
    assert len(set(routing.selected.sum(-1).flatten().tolist())) > 1
    torch.testing.assert_close(routing.gates.sum(-1), torch.ones(40, 3, dtype=torch.float64))


def test_expert_choice_fills_every_expert_and_no_padding():
    logits = scores(2, 8, 4)
    real = torch.ones(2, 8, dtype=torch.bool)
    real[1, 5:] = False
    config = RouterSettings(
        "linear", num_experts=4, top_k=2, topk_method="expert_choice", norm_topk_prob=False
    )
    routing = select(logits, config, real_BT=real)
    assert routing.selected.sum(1).tolist() == [[4] * 4, [3] * 4]  # ⌈2·8/4⌉ and ⌈2·5/4⌉ places each
    assert not routing.selected[1, 5:].any()
    probabilities = torch.softmax(logits, -1)
    for expert in range(4):
        taken = routing.selected[0, :, expert]
        assert probabilities[0, taken, expert].min() >= probabilities[0, ~taken, expert].max()
    alone = select(logits[1:, :5], config)
    assert torch.equal(alone.gates, routing.gates[1:, :5])


def test_relu_gates_are_the_positive_scores():
    logits = scores(2, 3, 4)
    gates = chosen(logits, scoring_func="relu", norm_topk_prob=False).gates
    assert torch.equal(gates, logits.clamp_min(0))


def test_raw_scores_are_the_gates():
    logits = scores(2, 3, 4)
    assert torch.equal(chosen(logits, scoring_func="none", norm_topk_prob=False).gates, logits)


def test_the_scaling_factor_multiplies_routed_experts_only():
    logits = scores(2, 3, 3)
    one = chosen(logits, num_experts=4, shared=(1,))
    two = chosen(logits, num_experts=4, shared=(1,), scaling_factor=2.5)
    routed = [0, 2, 3]
    assert torch.equal(one.gates[..., 1], torch.ones(2, 3, dtype=torch.float64))
    assert torch.equal(two.gates[..., 1], one.gates[..., 1])
    torch.testing.assert_close(two.gates[..., routed], 2.5 * one.gates[..., routed], atol=0, rtol=1e-14)
    torch.testing.assert_close(one.gates[..., routed], torch.softmax(logits, -1))


def test_a_shared_expert_beside_a_null_expert():
    logits = torch.tensor([[[0.0, 5.0]]])
    gates = chosen(logits, num_experts=2, shared=(0,), null_expert=True, top_k=1).gates
    assert gates.tolist() == [[[1.0, 0.0]]]


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid", "relu", "none"])
def test_absent_experts_get_nothing_and_the_others_are_as_if_alone(scoring_func):
    logits = scores(2, 3, 4)
    options = {"scoring_func": scoring_func, "norm_topk_prob": scoring_func == "softmax"}
    routing = chosen(logits, present=2, **options)
    assert (routing.gates[..., 2:] == 0).all()
    torch.testing.assert_close(routing.gates[..., :2], chosen(logits[..., :2], **options).gates)


def test_absent_experts_are_never_selected():
    routing = chosen(scores(50, 3, 4), present=3, top_k=2)
    assert not routing.selected[..., 3].any()
    assert chosen(scores(2, 3, 4), present=2, top_k=2).selected is None  # all that there are


def test_the_balancing_bias_chooses_and_does_not_weigh():
    logits = torch.tensor([[[2.0, 1.0, 0.0]]], dtype=torch.float64)
    options = RouterSettings("linear", num_experts=3, top_k=1, scoring_func="sigmoid", norm_topk_prob=False)
    bias = torch.tensor([0.0, 0.0, 5.0], dtype=torch.float64)
    assert select(logits, options).gates.argmax() == 0
    moved = select(logits, options, bias_X=bias).gates
    assert moved.flatten().tolist() == [0.0, 0.0, 0.5]


@pytest.mark.parametrize("columns", [1, 2, 8, 15, 16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 200)])
def test_softmax_of_short_rows(shape, columns):
    # Taken across where there are many, and the same to the last bits.
    logits = (5 * torch.randn(*shape, columns)).requires_grad_()
    direction = torch.randn(*shape, columns)
    found, wanted = SCORING_FUNCS["softmax"](logits), torch.softmax(logits, -1)
    torch.testing.assert_close(found, wanted, atol=1e-7, rtol=1e-6)
    grads = [torch.autograd.grad(out, logits, direction)[0] for out in (found, wanted)]
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("columns", [4, 12, 40])
def test_equal_scores_fall_alike_in_a_prompt_and_in_a_step(columns, k):
    # As with a KV cache: a token is decided among many or alone, with a graph or without one.
    logits = torch.randint(3, (1, 200, columns)).float()
    options = RouterSettings("linear", num_experts=columns, top_k=k, norm_topk_prob=True)
    together = select(logits, options).expert_ids
    alone = torch.cat([select(logits[:, t : t + 1], options).expert_ids for t in range(200)], dim=1)
    learning = select(logits.clone().requires_grad_(), options).expert_ids
    assert torch.equal(together, alone)
    assert torch.equal(together, learning)
