"""What is reported while a router trains, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from peft_moe.routers import RouterSettings, select
from peft_moe.routers.metrics import expert_load, routing_entropy, routing_summary
from peft_moe.routing.context import Routing, RoutingContext, RoutingRecord

REAL = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
CONTEXT = RoutingContext(real=REAL)
GATES = torch.tensor([[[1.0, 0], [0.5, 0.5], [0, 9]], [[0, 0], [9, 9], [9, 9]]])


def test_load_is_the_mean_gate_over_real_tokens():
    assert expert_load(Routing(GATES), CONTEXT).tolist() == pytest.approx([1.5 / 3, 0.5 / 3])


def test_load_of_constant_gates():
    routing = Routing(torch.tensor([[[0.25, 0.75]]]))
    assert expert_load(routing, CONTEXT).tolist() == [0.25, 0.75]


def test_load_of_padding_only_is_zero():
    assert expert_load(Routing(GATES), RoutingContext(real=torch.zeros(2, 3).bool())).tolist() == [0, 0]


def test_entropy_is_1_for_equal_scores_and_0_for_certain_ones():
    equal, certain = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    certain[..., 0] = 200.0
    assert routing_entropy(Routing(GATES, equal), CONTEXT).item() == pytest.approx(1.0)
    assert routing_entropy(Routing(GATES, certain), CONTEXT).item() == pytest.approx(0.0)


def test_entropy_by_hand_over_real_tokens_only():
    p = 0.9
    logits = torch.zeros(2, 3, 2)
    logits[0, 0, 0] = math.log(p / (1 - p))
    logits[~REAL] = torch.tensor([50.0, -50.0])
    one = -(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(2)
    assert routing_entropy(Routing(GATES, logits), CONTEXT).item() == pytest.approx((one + 2) / 3, rel=1e-5)


@pytest.mark.parametrize("logits", [None, torch.zeros(2, 3, 1)])
def test_entropy_without_a_choice_is_zero(logits):
    assert routing_entropy(Routing(GATES, logits), CONTEXT).item() == 0


def test_summary_is_the_mean_over_routers_and_shows_the_null_expert():
    other = torch.tensor([[[0.5, 0.5]]])
    record = RoutingRecord(
        {"a": Routing(GATES, torch.zeros(2, 3, 3)), "b": Routing(other, torch.zeros(1, 1, 3))}, CONTEXT
    )
    found = routing_summary(record, ["math", "code"])
    assert list(found) == ["load/math", "load/code", "load/null", "router_entropy"]
    assert found["load/math"] == pytest.approx(0.5)
    assert found["load/code"] == pytest.approx((0.5 / 3 + 0.5) / 2)
    assert found["load/null"] == pytest.approx(1 - found["load/math"] - found["load/code"])
    assert found["router_entropy"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"top_k": 1},
        {"top_k": 2, "norm_topk_prob": False},
        {"scoring_func": "sigmoid", "norm_topk_prob": False},
        {"scoring_func": "sigmoid", "scaling_factor": 2.5},
        {"top_k": 1, "straight_through": True},
    ],
)
def test_load_of_the_null_expert_is_its_own_weight(fields):
    """Not what the others leave of 1, which holds for normalised weights without a factor only."""
    logits = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))
    settings = RouterSettings("linear", num_experts=3, shared=(1,), null_expert=True, **fields)
    # The same scores with a real expert in the null expert's place show what its gate would be.
    shown = select(logits, RouterSettings("linear", num_experts=3, **fields)).gates / settings.scaling_factor
    record = RoutingRecord({"a": select(logits, settings)}, CONTEXT)
    found = routing_summary(record, ["math", "all", "code"], ["all"], {"a": settings})
    assert found["load/all"] == 1
    assert found["load/null"] == pytest.approx(shown[..., 2][REAL].mean().item())
    for column, name in enumerate(("math", "code")):
        wanted = shown[..., column][REAL].mean().item() * settings.scaling_factor
        assert found[f"load/{name}"] == pytest.approx(wanted)


def test_summary_without_null_expert_does_not_name_one():
    record = RoutingRecord({"a": Routing(GATES, torch.zeros(2, 3, 2))}, CONTEXT)
    assert "load/null" not in routing_summary(record, ["math", "code"])


def test_summary_of_nothing_is_empty():
    assert routing_summary(RoutingRecord(), ["a"]) == {}
    assert routing_summary(RoutingRecord(context=CONTEXT), ["a"]) == {}


def test_wrong_number_of_names_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        routing_summary(RoutingRecord({"a": Routing(GATES)}, CONTEXT), ["only"])


def test_metrics_carry_no_gradient():
    gates, logits = GATES.clone().requires_grad_(), torch.zeros(2, 3, 2, requires_grad=True)
    assert not expert_load(Routing(gates, logits), CONTEXT).requires_grad
    assert not routing_entropy(Routing(gates, logits), CONTEXT).requires_grad
