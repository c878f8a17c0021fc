"""``torch.compile`` takes a mixture whole: one graph, the same numbers, and what is set around it is seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.batches import batch_for, labels_for, logits_of, texts
from support.routing import routers
from support.zoo import Zoo
from torch import nn

from peft_moe import record_routing, routing_inputs

BATCH = batch_for("llama", texts())
# Static, dense and sparse, in every scope, tapped and probed.
PLACES = ["uniform", "static", "dense", "top2", "block", "token-probe", "prompt-base"]


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: Any, backend: str = "aot_eager") -> nn.Module:
    """Traced and partitioned as for every backend; "aot_eager" only leaves out the code generator."""
    return torch.compile(model.get_base_model(), fullgraph=True, backend=backend)


@pytest.mark.parametrize("routing", PLACES)
def test_one_graph(zoo: Zoo, routing: str) -> None:
    model = zoo.mixture("llama", routing)
    torch.testing.assert_close(
        logits_of(compiled(model), BATCH), logits_of(model, BATCH), atol=1e-5, rtol=1e-5
    )


def test_training_through_one_graph(zoo: Zoo) -> None:
    gradients = []
    for wrap in (lambda m: m, compiled):
        model = zoo.mixture("llama", "dense").train()
        wrap(model)(**BATCH, labels=labels_for("llama", BATCH)).loss.backward()
        gradients.append(
            {n: p.grad for name, r in routers(model) for n, p in r.named_parameters(prefix=name)}
        )
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_what_is_set_around_a_compiled_call_is_seen(zoo: Zoo) -> None:
    model = zoo.mixture("llama", "dense")
    compile_ = compiled(model)
    plain = logits_of(compile_, BATCH)
    for chosen in (0, 2):
        gates = torch.eye(3)[[chosen]]
        with routing_inputs(gates=gates):
            given, expected = logits_of(compile_, BATCH), logits_of(model, BATCH)
        torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(given, plain, atol=1e-2)
    assert torch.equal(logits_of(compile_, BATCH), plain)
    with record_routing() as record:
        logits_of(compile_, BATCH)
    with record_routing() as eager:
        logits_of(model, BATCH)
    assert record.decisions.keys() == eager.decisions.keys()
    for name, decision in eager.decisions.items():
        torch.testing.assert_close(record.decisions[name].gates, decision.gates, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["uniform", "static", "dense", "top2"])
def test_generated_code(zoo: Zoo, routing: str) -> None:
    model = zoo.mixture("llama", routing)
    # Fused sums round in another order.
    torch.testing.assert_close(
        logits_of(compiled(model, "inductor"), BATCH), logits_of(model, BATCH), atol=1e-4, rtol=1e-4
    )
