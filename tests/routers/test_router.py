"""The router as a module: dtypes, autocast, shapes, pooling, the registry."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from peft_moe.errors import PeftMoeError
from peft_moe.routers import PRESETS, Router, RouterSettings, Scorer, available_scorers, register_router
from peft_moe.routers.scorer import scorer_class
from peft_moe.routing.context import RoutingContext

WIDTH = 6


def router(scorer="linear", seed=0, **fields):
    torch.manual_seed(seed)
    return Router(RouterSettings(scorer, **{"num_experts": 3, "init_std": 0.5, **fields}), WIDTH)


def tokens(dtype=torch.float32, shape=(2, 5, WIDTH)):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


CASTS = {
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "to(cpu, float16)": lambda m: m.to("cpu", torch.float16),
    "half()": lambda m: m.half(),
    "bfloat16()": lambda m: m.bfloat16(),
    "double()": lambda m: m.double(),
    "type()": lambda m: m.type(torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_weights_stay_float32_and_bit_equal(cast):
    module = nn.Sequential(nn.Linear(2, 2), router())
    before = copy.deepcopy(module[1].state_dict())
    CASTS[cast](module)
    assert module[0].weight.dtype != torch.float32  # the cast did act
    for name, value in module[1].state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])
    assert all(p.requires_grad for p in module[1].parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_gates_are_float32_or_wider(dtype):
    routing = router()(tokens(dtype))
    assert routing.gates.dtype == routing.logits.dtype == torch.promote_types(dtype, torch.float32)


def test_float64_input_is_decided_in_float64():
    module, x = router(), tokens(torch.float64)
    logits = x @ module.scorer.weight.detach().double().T
    torch.testing.assert_close(module(x).gates, torch.softmax(logits, -1), atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_the_router(dtype):
    module, x = router(input_norm=True), tokens()
    with torch.autocast("cpu", dtype=dtype):
        inside = module(x)
    assert torch.equal(inside.gates, module(x).gates)
    assert inside.gates.dtype == torch.float32


def test_moving_to_another_device_works():
    module = router().to("meta")
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert {p.dtype for p in module.half().to_empty(device="cpu").parameters()} == {torch.float32}


def test_shapes_by_kind():
    x = tokens()
    assert router()(x).gates.shape == (2, 5, 3)
    assert router(null_expert=True)(x).logits.shape == (2, 5, 4)
    uniform = router("uniform")(x)
    assert uniform.gates.shape == (1, 1, 3)
    assert uniform.is_constant
    assert uniform.gates.flatten().tolist() == pytest.approx([1 / 3] * 3)
    assert router(granularity="sequence")(x).gates.shape == (2, 1, 3)


def test_zero_init_starts_as_the_gate_less_mixture():
    gates = router(init_std=0.0)(tokens()).gates
    torch.testing.assert_close(gates, torch.full_like(gates, 1 / 3))


def test_random_router_is_drawn_fixed_and_differs_by_token():
    module = router("random")
    assert not module.trainable
    gates = module(tokens()).gates
    assert gates.std(dim=1).min() > 1e-3
    assert torch.equal(gates, router("random")(tokens()).gates)
    assert not torch.equal(gates, router("random", seed=1)(tokens()).gates)


def test_input_norm_removes_the_scale_of_a_token():
    x = tokens()
    plain, normed = router(), router(input_norm=True)
    torch.testing.assert_close(normed(x).gates, normed(100 * x).gates, atol=1e-5, rtol=1e-5)
    assert (plain(x).gates - plain(100 * x).gates).abs().max() > 0.1
    rms = normed.features(x).square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.ones_like(rms), atol=1e-5, rtol=1e-5)


def test_sequence_decision_is_that_of_the_pooled_prompt():
    module, x = router(granularity="sequence"), tokens()
    prompt = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 0]]).bool()
    found = module(x, RoutingContext(prompt=prompt)).gates
    pooled = torch.stack([x[0, :2].mean(0), x[1, 1:4].mean(0)])[:, None]
    torch.testing.assert_close(found, router()(pooled).gates)


def test_turns_take_their_own_decision():
    module, x = router(granularity="sequence", pool="last"), tokens(shape=(1, 5, WIDTH))
    context = RoutingContext(
        prompt=torch.tensor([[1, 1, 0, 1, 0]]).bool(),
        segment=torch.tensor([[0, 0, 0, 1, 1]]),
        num_segments=2,
    )
    found = module(x, context).gates
    wanted = router()(x[:, [1, 1, 1, 3, 3]]).gates
    torch.testing.assert_close(found, wanted)


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RouterSettings("linear", num_experts=2).top_k = 1


class TestRegistry:
    def test_built_ins_are_listed(self):
        assert {"linear", "random", "uniform"} <= set(available_scorers())
        assert available_scorers() == sorted(available_scorers())

    def test_unknown_name_is_answered_with_near_matches(self):
        with pytest.raises(PeftMoeError, match=r"router='lineer'.*'linear'"):
            scorer_class("lineer")

    def test_taken_name_is_refused_and_keeps_its_class(self, registry):
        before = registry["linear"]
        with pytest.raises(PeftMoeError, match="'linear' is taken by"):
            register_router("linear")(type("Mine", (Scorer,), {}))
        assert registry["linear"] is before

    def test_same_class_name_in_another_module_is_refused(self, registry):
        register_router("mine")(type("Mine", (Scorer,), {"__module__": "plugin_a"}))
        register_router("mine")(type("Mine", (Scorer,), {"__module__": "plugin_a"}))  # a cell that runs twice
        with pytest.raises(PeftMoeError, match=r"taken by plugin_a\.Mine"):
            register_router("mine")(type("Mine", (Scorer,), {"__module__": "plugin_b"}))

    def test_name_of_a_preset_is_refused(self, registry):
        assert "context" in PRESETS
        with pytest.raises(PeftMoeError, match="'context' is taken by a preset"):
            register_router("context")(type("Mine", (Scorer,), {}))
        assert "context" not in registry

    @pytest.mark.parametrize("name", ["", 3, None])
    def test_name_must_be_text(self, registry, name):
        with pytest.raises(PeftMoeError, match="non-empty text"):
            register_router(name)(type("Mine", (Scorer,), {}))

    @pytest.mark.parametrize("thing", [nn.Linear, lambda x: x])
    def test_only_scorers_register(self, registry, thing):
        with pytest.raises(PeftMoeError, match="not a Scorer"):
            register_router("mine")(thing)
        assert "mine" not in registry

    def test_presets_name_scorers_that_exist(self):
        assert {preset.fields["scorer"] for preset in PRESETS.values()} <= set(available_scorers())

    def test_a_scorer_must_write_forward(self):
        settings = RouterSettings("linear", num_experts=2)
        with pytest.raises(NotImplementedError):
            Scorer(settings, WIDTH)(tokens())
