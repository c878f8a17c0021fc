"""After whatever PEFT does to a mixture: exactly the routers train, and not a byte of an expert moves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.batches import batch_for, labels_for, texts
from support.routing import ROUTINGS, routers
from support.zoo import Zoo
from torch import nn

BATCH = batch_for("llama", texts())
LABELS = labels_for("llama", BATCH)
BASES: dict[str, Callable[[nn.Module], nn.Module]] = {"fp32": nn.Module.float, "bf16": nn.Module.bfloat16}


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def router_names(model: nn.Module, adapter: str = "default") -> set[str]:
    return {f"{name}.{n}" for name, router in routers(model, adapter) for n, _ in router.named_parameters()}


def digest(model: nn.Module, adapter: str = "default") -> dict[str, str]:
    """SHA-256 of the bytes of everything that is no router."""
    return {
        name.replace(f".{adapter}.", ".*."): hashlib.sha256(
            p.detach().contiguous().view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, p in model.named_parameters()
        if "molora_router" not in name and (adapter in name or "molora" not in name)
    }


def step(model: PeftModel) -> None:
    """One optimiser step over all parameters that a trainer would hand to it."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0)
    model.train()(**BATCH, labels=LABELS).loss.backward()
    optimizer.step()
    model.zero_grad(set_to_none=True)
    model.eval()


def toggle(model: PeftModel) -> None:
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()


def context(model: PeftModel) -> None:
    with model.disable_adapter():
        model(**BATCH)


def second_adapter(model: PeftModel) -> None:
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    assert trained(model) == router_names(model, "second")
    model.set_adapter("default")
    assert trained(model) == router_names(model)
    model.delete_adapter("second")


EVENTS: dict[str, Callable[[PeftModel], object]] = {
    "inject": lambda model: None,
    "set": lambda model: model.set_adapter("default"),
    "toggle": toggle,
    "context": context,
    "second": second_adapter,
    "train-eval": lambda model: model.train().eval(),
    "generate": lambda model: model.generate(BATCH["input_ids"], max_new_tokens=3),
    "generate-no-cache": lambda model: model.generate(BATCH["input_ids"], max_new_tokens=3, use_cache=False),
    "checkpointing": lambda model: model.gradient_checkpointing_enable(),
    "cast": lambda model: model.to(torch.float32),
    "step": step,
}


@pytest.mark.parametrize("dtype", BASES)
@pytest.mark.parametrize("routing", ["dense", "block", "prompt-soft"])
def test_exactly_the_routers_train_after_every_event(zoo: Zoo, routing: str, dtype: str) -> None:
    model = zoo.mixture("llama", routing, base=BASES[dtype](zoo.base("llama")))
    before, expected = digest(model), router_names(model)
    assert expected
    assert any("molora_A" in name for name in before)
    for name, event in EVENTS.items():
        if name == "cast" and dtype == "bf16":
            continue  # widening the base changes its bytes by design
        event(model)
        assert trained(model) == expected, name
        assert digest(model) == before, name


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("routing", ["dense", "random", "block", "prompt-soft"])
def test_loading(zoo: Zoo, routing: str, is_trainable: bool, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = zoo.mixture("llama", routing)
    model.save_pretrained(str(tmp_path))
    assert trained(model) == (set() if routing == "random" else router_names(model))
    loaded = PeftModel.from_pretrained(
        zoo.base("llama"), str(tmp_path), is_trainable=is_trainable, low_cpu_mem_usage=low_cpu_mem_usage
    )
    expected = router_names(loaded) if is_trainable and routing != "random" else set()
    assert trained(loaded) == expected
    assert digest(loaded) == digest(model)
    if expected:
        step(loaded)
        assert trained(loaded) == expected
        assert digest(loaded) == digest(model)


@pytest.mark.parametrize("routing", [r for r in ROUTINGS if r not in {"uniform", "random", "prompt-probe"}])
def test_a_step_changes_every_router_and_nothing_else(zoo: Zoo, routing: str) -> None:
    model = zoo.mixture("llama", routing)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == router_names(model)


@pytest.mark.parametrize("routing", ["dense", "block", "prompt-soft"])
def test_given_experts_train_where_asked(zoo: Zoo, routing: str) -> None:
    model = zoo.mixture("llama", routing, train_experts=True)
    expected = {name for name, _ in model.named_parameters() if "molora" in name}
    for name, event in EVENTS.items():
        if name == "second":
            continue  # expects frozen experts
        event(model)
        assert trained(model) == expected, name
