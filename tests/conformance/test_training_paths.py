"""Gradients: checkpointed or not, two passes before one backward, and against a loop by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from support.bases import ARCHITECTURES
from support.batches import batch_for, labels_for, texts
from support.routing import GATED, ROUTINGS, routers
from support.zoo import Zoo
from torch import Tensor

from peft_moe import PeftMoeError, record_routing

# The recomputed layers do the same sums in the same order; only accumulation into .grad may differ.
SAME = {"atol": 1e-6, "rtol": 1e-5}

# Random weights are frozen: nothing to compare.
TRAINED = [(name, routing) for name, routing in GATED if routing != "random"]
TAPPED = [
    "token-probe",
    "token-base",
    "token-prompt",
    "prompt-probe",
    "prompt-base",
    "prompt-soft",
    "running-base",
]
LLAMA = [routing for name, routing in TRAINED if name == "llama"]


def gradients(model: PeftModel) -> dict[str, Tensor]:
    """Gradients of the router weights, taken away from the model."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert one
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, **SAME)
    assert max(gradient.abs().max() for gradient in one.values()) > 1e-4


def loss_of(name: str, model: PeftModel, seed: int) -> Tensor:
    batch: dict[str, Any] = batch_for(name, texts(seed, lengths=(9, 6)))
    return model(**batch, labels=labels_for(name, batch)).loss


def checkpointed(model: PeftModel) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@pytest.mark.parametrize(("name", "routing"), TRAINED)
def test_checkpointing_changes_neither_loss_nor_router_gradients(zoo: Zoo, name: str, routing: str) -> None:
    model = zoo.mixture(name, routing).train()
    expected = loss_of(name, model, 0)
    expected.backward()
    plain = gradients(model)
    checkpointed(model)
    loss = loss_of(name, model, 0)
    loss.backward()
    assert torch.equal(loss, expected)
    assert_same_gradients(plain, gradients(model))


@pytest.mark.parametrize(("name", "routing"), [p for p in TRAINED if p[0] in {"llama", "gpt2", "t5"}])
def test_two_passes_before_one_backward(zoo: Zoo, name: str, routing: str) -> None:
    """As preference training does; the first pass is recomputed after the second one has run."""
    model = zoo.mixture(name, routing).train()
    (loss_of(name, model, 0) - 2 * loss_of(name, model, 1)).backward()
    plain = gradients(model)
    checkpointed(model)
    first, second = loss_of(name, model, 0), loss_of(name, model, 1)
    with torch.no_grad():
        loss_of(name, model, 2)  # a reference or metric pass in between
    (first - 2 * second).backward()
    assert_same_gradients(plain, gradients(model))


@pytest.mark.parametrize("routing", LLAMA)
def test_recomputation_does_not_count_decisions_twice(zoo: Zoo, routing: str) -> None:
    model = zoo.mixture("llama", routing).train()
    with record_routing() as plain:
        loss_of("llama", model, 0).backward()
    checkpointed(model)
    with record_routing() as record:
        loss_of("llama", model, 0).backward()
    assert record.decisions.keys() == plain.decisions.keys()
    for key, decision in plain.decisions.items():
        assert torch.equal(record.decisions[key].gates, decision.gates)


@pytest.mark.parametrize("routing", TAPPED)
def test_reentrant_checkpointing_of_a_shared_decision_is_refused(zoo: Zoo, routing: str) -> None:
    model = zoo.mixture("llama", routing).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(PeftMoeError, match="use_reentrant=False"):
        loss_of("llama", model, 0)


@pytest.mark.parametrize("routing", ["dense", "top2", "block", "prompt-module", "prompt-block"])
def test_reentrant_checkpointing_within_a_layer_gives_the_same_gradients(zoo: Zoo, routing: str) -> None:
    model = zoo.mixture("llama", routing).train()
    loss_of("llama", model, 0).backward()
    plain = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    loss_of("llama", model, 0).backward()
    assert_same_gradients(plain, gradients(model))


# The others have norms that work in float32 whatever the model is cast to.
DOUBLE = [pair for pair in TRAINED if pair[0] in {"gpt2", "bert"}]


@pytest.mark.parametrize(("name", "routing"), DOUBLE)
def test_router_gradients_are_the_slopes_of_the_output(zoo: Zoo, name: str, routing: str) -> None:
    """In float64, against differences along one random direction."""
    model = zoo.mixture(name, routing, **_smooth(routing)).double()
    weights = [parameter for _, router in routers(model) for parameter in router.parameters()]
    generator = torch.Generator().manual_seed(0)
    batch = batch_for(name, texts())
    direction = [torch.randn(w.shape, generator=generator).double() for w in weights]
    # Routers keep their float32 through .double() too; here they must be as exact as the model.
    start = [w.data.double() for w in weights]
    mix = torch.randn(batch["input_ids"].shape, generator=generator).double() * batch["attention_mask"]

    def output(step: float) -> Tensor:
        for weight, origin, way in zip(weights, start, direction, strict=True):
            weight.data = origin + step * way
        return (model(**batch).logits.sin().sum(-1) * mix).sum()

    output(0.0).backward()
    slope = sum((w.grad * d).sum() for w, d in zip(weights, direction, strict=True))
    with torch.no_grad():
        measured = (output(1e-5) - output(-1e-5)) / 2e-5
    assert abs(slope) > 1e-2
    # Central differences err by the step squared, 1e-10, and by float64 over the step, 1e-10.
    torch.testing.assert_close(measured, slope, rtol=1e-6, atol=1e-7)


def _smooth(routing: str) -> dict[str, Any]:
    # Straight-through gradients are those of other gates than the forward pass has.
    if ROUTINGS[routing]["router"] == "context":
        return {"straight_through": False, "norm_topk_prob": False}
    return {}


def test_every_architecture_is_covered() -> None:
    assert {name for name, _ in TRAINED} == set(ARCHITECTURES)
