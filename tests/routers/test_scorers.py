"""Each scorer against its formula, and what it needs to be told."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from peft_moe import PeftMoeError
from peft_moe.routers import PRESETS, Router, RouterSettings
from peft_moe.routing.context import RoutingContext

WIDTH = 6


def router(scorer, experts=3, **fields):
    torch.manual_seed(0)
    return Router(RouterSettings(scorer, num_experts=experts, **fields), WIDTH)


def tokens(*shape):
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(1))


def called(**known):
    return RoutingContext(shape=(2, 4), **known)


def test_static_starts_as_gateless_whatever_the_activation():
    for fields in ({}, {"scoring_func": "none", "norm_topk_prob": False}):
        gates = router("static", **fields)(tokens(2, 4)).gates
        assert gates.shape == (1, 1, 3)
        torch.testing.assert_close(gates, torch.full((1, 1, 3), 1 / 3))


def test_sum_weighs_every_expert_by_lambda():
    fields = PRESETS["sum"].fields
    gates = router(
        fields["scorer"],
        scoring_func=fields["scoring_func"],
        norm_topk_prob=fields["norm_topk_prob"],
        scaling_factor=0.4,
    )(tokens(1, 1)).gates
    torch.testing.assert_close(gates, torch.full((1, 1, 3), 0.4))


def test_noise_differs_by_token_and_call_and_has_its_standard_deviation():
    noise = router("noise", experts=4, init_std=0.5)
    x = tokens(50, 50)
    one, two = noise(x).logits, noise(x).logits
    assert not torch.equal(one, two)
    assert one.flatten().unique().numel() > 9000
    assert abs(one.std().item() - 0.5) < 0.02  # of 10,000 draws: 0.0035 standard error


def test_noisy_linear_adds_its_learnt_noise_in_training_only():
    noisy = router("noisy_linear", init_std=1.0)
    x = tokens(1, 1).expand(1, 20_000, WIDTH)
    quiet = noisy.eval()(x).logits
    assert torch.equal(quiet, noisy(x).logits)
    torch.testing.assert_close(quiet, functional.linear(x, noisy.scorer.weight))
    with torch.no_grad():
        noisy.scorer.noise_weight.normal_()
    noise = noisy.train()(x).logits - quiet
    wanted = functional.softplus(functional.linear(x[:, :1], noisy.scorer.noise_weight))
    torch.testing.assert_close(noise.std(dim=1), wanted[:, 0], rtol=0.03, atol=0.0)


def test_mlp_is_two_layers_with_silu():
    mlp = router("mlp", hidden_size=5, init_std=1.0)
    assert (router("mlp").scorer(tokens(2, 4)) == 0).all()  # starts as gate-less
    x = tokens(2, 4)
    inner = x @ mlp.scorer.hidden.weight.T + mlp.scorer.hidden.bias
    wanted = (inner * torch.sigmoid(inner)) @ mlp.scorer.out.weight.T + mlp.scorer.out.bias
    assert mlp.scorer.hidden.weight.shape == (5, WIDTH)
    torch.testing.assert_close(mlp(x).logits, wanted)


def test_oracle_gives_the_label_its_expert_and_unknown_ones_all_alike():
    oracle = router("oracle", null_expert=True)
    gates = oracle(tokens(4, 2), called(domains=torch.tensor([2, 0, 3, -1]))).gates
    assert gates[:3, 0].tolist() == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(gates[3, 0], torch.full((3,), 0.25))


def test_poly_gives_a_task_its_own_row():
    poly = router("poly", scoring_func="sigmoid").eval()
    with torch.no_grad():
        poly.scorer.weight.normal_()
    gates = poly(tokens(3, 2), called(domains=torch.tensor([1, 1, -1]))).gates
    rows = torch.sigmoid(torch.stack([poly.scorer.weight[1]] * 2 + [poly.scorer.weight.mean(0)]))
    torch.testing.assert_close(gates[:, 0], rows / rows.sum(-1, keepdim=True))


def test_poly_draws_relaxed_bernoulli_gates_in_training():
    poly = router("poly", scoring_func="sigmoid", norm_topk_prob=False).train()
    with torch.no_grad():
        poly.scorer.weight.copy_(torch.tensor([[0.0, 2.0, -2.0]]).expand(3, 3))
    gates = poly(tokens(4000, 1), called(domains=torch.zeros(4000, dtype=torch.long))).gates[:, 0]
    # P(gate > 1/2) is sigmoid(Φ), at any temperature.
    share = (gates > 0.5).float().mean(0)
    torch.testing.assert_close(share, torch.sigmoid(torch.tensor([0.0, 2.0, -2.0])), atol=0.03, rtol=0)


def test_hash_is_fixed_balanced_and_blind_to_hidden_states():
    ids = torch.arange(8000).view(1, -1)
    one, two = (
        router("hash", experts=4)(x, called(input_ids=ids)).gates for x in (tokens(1, 1), tokens(1, 3))
    )
    assert torch.equal(one, two)
    assert ((one == 0) | (one == 1)).all()
    assert (one.sum(-1) == 1).all()
    load = one.mean(dim=(0, 1))
    assert (load - 0.25).abs().max() < 0.05


@pytest.mark.parametrize(
    ("scorer", "missing"), [("oracle", "domains"), ("poly", "domains"), ("hash", "input_ids")]
)
def test_what_the_call_does_not_say_is_asked_for(scorer, missing):
    for context in (None, called()):
        with pytest.raises(PeftMoeError, match=rf"router='{scorer}'.*{missing}"):
            router(scorer)(tokens(2, 4), context)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_say_where_they_come_from_and_what_they_need(name):
    preset = PRESETS[name]
    assert preset.summary
    assert preset.needs
    assert preset.paper == "this project" or math.floor(float(preset.paper)) > 1000  # an arXiv number
