"""What a layer saves in a step must not be seen: sums in place, shared wide copies, children at hand."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_moe.routers.fp32_linear import PART_BYTES, UpcastCache
from peft_moe.routing.cached_submodules import cache_submodules
from peft_moe.tuner.layers.linear import MoLoraLayer, gives_new_memory

IDS = torch.tensor([[5, 9, 3, 7, 11]])


def logits_of(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def some_layer(model: nn.Module) -> MoLoraLayer:
    return next(m for m in model.modules() if isinstance(m, MoLoraLayer))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_who_hooks_a_base_layer_keeps_what_it_gave(zoo, architecture):
    model = zoo.mixture(architecture, "top2")
    layer = some_layer(model)
    assert gives_new_memory(layer.base_layer)  # so that without a hook it is overwritten
    quiet = logits_of(model)
    seen: list[Any] = []
    handle = layer.base_layer.register_forward_hook(lambda m, args, out: seen.append((out, out.clone())))
    assert torch.equal(logits_of(model), quiet)
    handle.remove()
    kept, then = seen[0]
    assert torch.equal(kept, then)


def test_no_other_module_is_overwritten(zoo):
    class Keeps(nn.Linear):
        """Gives what it holds."""

        def forward(self, x):
            self.last = super().forward(x)
            return self.last

    assert not gives_new_memory(Keeps(2, 2))
    patched = nn.Linear(2, 2)
    patched.forward = lambda x: x
    assert not gives_new_memory(patched)
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    assert not gives_new_memory(nn.Linear(2, 2))
    handle.remove()
    assert gives_new_memory(nn.Linear(2, 2))

    model = zoo.mixture("llama", "top2")
    wanted = logits_of(model)
    layer = some_layer(model)
    keeper = Keeps(layer.in_features, layer.out_features, bias=False)
    keeper.weight = layer.base_layer.weight
    layer.base_layer = keeper
    assert torch.equal(logits_of(model), wanted)
    held = keeper.last
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    logits_of(model)
    handle.remove()
    assert torch.equal(held, nn.functional.linear(seen[0], keeper.weight))


def bf16_mixture(zoo, **fields):
    model = zoo.mixture("llama", "top2", base=zoo.base("llama").bfloat16(), **fields)
    model.base_model.bfloat16()
    return model


class Widenings(TorchDispatchMode):
    """Notes the shapes of all bfloat16 tensors that are made float32."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.bfloat16:
            self.shapes += [tuple(args[0].shape)] if kwargs.get("dtype") == torch.float32 else []
        return func(*args, **kwargs)


@pytest.mark.parametrize("scope", ["module", "block", "model"])
def test_a_pass_with_and_without_the_shared_wide_copy(zoo, scope, monkeypatch):
    below = {"router_below_tap": "probe"} if scope == "model" else {}
    model = bf16_mixture(zoo, router_scope=scope, backend="gather", **below)
    shared = logits_of(model)
    with torch.inference_mode():  # where nobody counts changes in place, nothing is shared
        assert torch.equal(model(input_ids=IDS).logits, shared)
    monkeypatch.setattr(UpcastCache, "find", lambda self, x: None)
    assert torch.equal(logits_of(model), shared)


def test_siblings_share_one_wide_copy(zoo, monkeypatch):
    model = bf16_mixture(zoo)
    seen: list[Any] = []
    for layer in (m for m in model.modules() if isinstance(m, MoLoraLayer)):
        layer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with Widenings() as shared:
        logits_of(model)
    inputs = len({id(x) for x in seen})
    assert inputs < len(seen)
    monkeypatch.setattr(UpcastCache, "find", lambda self, x: None)
    with Widenings() as alone:
        logits_of(model)
    assert len(alone.shapes) - len(shared.shapes) == len(seen) // 2 - inputs


def test_a_wide_copy_follows_changes_and_keeps_nothing_alive():
    copies, x = UpcastCache(), torch.ones(2, 3, dtype=torch.bfloat16)
    with torch.no_grad():
        wide = copies.make(x)
        assert wide is not None
        assert copies.make(x) is wide is copies.find(x)
        assert copies.find(x.view(2, 3)) is None
        x.mul_(2)
        assert copies.find(x) is None
        assert torch.equal(copies.make(x), x.float())
        watch = weakref.ref(x)
        del x
        assert watch() is None
        assert copies.make(torch.ones(1, PART_BYTES // 4 + 1, dtype=torch.bfloat16)) is None
        assert copies.make(torch.ones(2, 3)) is None
    assert copies.make(torch.ones(2, 3, dtype=torch.bfloat16)) is None  # a graph would keep it


def test_a_base_layer_that_a_quantiser_swaps_is_the_one_that_is_called(zoo):
    model = zoo.mixture("llama", "top2")
    layer = some_layer(model)
    before = logits_of(model)
    # As torch.ao.quantization.convert does it: past nn.Module's own assignment.
    other = copy.deepcopy(layer.base_layer)
    with torch.no_grad():
        other.weight.mul_(2)
    layer._modules["base_layer"] = other
    assert not torch.equal(logits_of(model), before)


def test_cached_submodules_follow_assignment_and_copies():
    parent = nn.Module()
    parent.child = nn.Linear(2, 2)
    cache_submodules(parent, "child")
    assert parent.__dict__["child"] is parent.child
    assert [name for name, _ in parent.named_modules()] == ["", "child"]
    twin = copy.deepcopy(parent)
    assert twin.child is twin._modules["child"] is not parent.child
    parent.child = nn.Linear(3, 3)
    assert parent.child.in_features == 3
    assert "child" not in parent.__dict__
