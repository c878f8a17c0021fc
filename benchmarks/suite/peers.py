"""Other projects' mixtures of LoRA experts, as installed: PEFT's X-LoRA and Arrow, and mergoo's layer.

Each runs in a setting that favours it: adapters in the base's dtype, frozen experts, X-LoRA's single layer
without its second pass of the base. mergoo gets a gate of the layer's width; with its own gate it fails on
`down_proj`.
"""

from __future__ import annotations

import copy
import math
import tempfile
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, XLoraConfig, get_peft_model
from peft.tuners.lora.config import ArrowConfig
from peft.tuners.xlora.layer import XLoraLinearLayer
from torch import Tensor, nn
from torch.nn import functional

from .experts import DTYPE, Case, Experts, adapted
from .mergoo import moe_layer_class
from .methods import Method


def _loras(base: nn.Module, experts: Experts) -> Any:
    """Make a PEFT model with one frozen LoRA adapter per expert, named "0", "1", …."""
    config = LoraConfig(r=experts.rank, lora_alpha=experts.rank, target_modules=experts.targets)
    model = get_peft_model(base, config, adapter_name="0", autocast_adapter_dtype=False)
    for expert in range(1, experts.count):
        model.add_adapter(str(expert), config, autocast_adapter_dtype=False)
    _fill(model, experts)
    return model.requires_grad_(False)


def _fill(model: nn.Module, experts: Experts) -> None:
    for name, layer in adapted(model):
        for expert in range(experts.count):
            layer.lora_A[str(expert)].weight.data = experts.A[name][expert].clone()
            layer.lora_B[str(expert)].weight.data = experts.B[name][expert].T.contiguous()


def arrow(base: nn.Module, experts: Experts, case: Case) -> Method:
    """Make PEFT's Arrow: its prototypes come from the experts, and nothing is trained."""
    model = _loras(base, experts)
    settings = ArrowConfig(top_k=case.active, rng_seed=0)
    settings.task_adapter_names = [str(expert) for expert in range(experts.count)]
    config = LoraConfig(r=experts.rank, target_modules=experts.targets, arrow_config=settings)
    model.add_adapter("arrow_router", config, autocast_adapter_dtype=False)
    model.set_adapter("arrow_router")
    model.requires_grad_(False)

    def gates(layer: Any, name: str, x_NI: Tensor) -> Tensor:
        # Softmax over the k prototypes with the largest absolute product with the input (arXiv 2405.11157).
        scores_NE = (x_NI @ layer.lora_arrow["arrow_router"].prototypes.T).abs()
        return _top(scores_NE, case.active)

    return Method(model, gates, experts.count, peer=True)


def xlora(base: nn.Module, experts: Experts, case: Case) -> Method:
    """Make PEFT's X-LoRA as documented: a classifier on a first pass of the bare base weighs all experts."""
    if case.width is not None:
        return _xlora_layer(base, experts)
    with tempfile.TemporaryDirectory() as folder:
        _loras(copy.deepcopy(base), experts).save_pretrained(folder)
        base.config.use_cache = False  # X-LoRA refuses a base with a KV cache
        config = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=base.config.hidden_size,
            adapters={str(expert): f"{folder}/{expert}" for expert in range(experts.count)},
        )
        model = get_peft_model(base, config, autocast_adapter_dtype=False)
    model.to(DTYPE)  # X-LoRA loads adapters in float32, which doubles the traffic
    _fill(model, experts)  # X-LoRA needs numbers as names, and PEFT loses keys of such adapters on saving
    tuner = model.base_model
    order = {name: number for number, (name, _) in enumerate(adapted(model))}

    def gates(layer: nn.Module, name: str, x_NI: Tensor) -> Tensor:
        return tuner.internal_xlora_scalings[:, :, order[name]].reshape(-1, experts.count)

    trains = list(tuner.internal_xlora_classifier.parameters())
    return Method(model, gates, experts.count, trains, caches=False, peer=True)


class _XLoraLayer(nn.Module):
    """X-LoRA's layer with a classifier on its input instead of one on the base's last hidden state."""

    def __init__(self, layer: nn.Module, weight_EI: Tensor) -> None:
        super().__init__()
        self.inner = layer
        self.classifier = nn.Parameter(weight_EI)
        self.forward_inner = XLoraLinearLayer(
            model=SimpleNamespace(disabled=False),  # type: ignore[arg-type]  # it reads nothing else of the tuner
            target=layer,
            target_forward=layer.forward,
            layer_number=0,
            config=XLoraConfig(hidden_size=weight_EI.shape[1], adapters={}),
        ).forward

    @property
    def base_layer(self) -> nn.Module:
        return self.inner.base_layer

    def decide(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.classifier).softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_inner(x, scalings=self.decide(x).unsqueeze(2))


def _xlora_layer(base: nn.Module, experts: Experts) -> Method:
    loras = _loras(base, experts)
    loras.base_model.set_adapter([str(expert) for expert in range(experts.count)])
    loras.requires_grad_(False)
    (name, layer) = adapted(loras)[0]
    wrapped = _XLoraLayer(layer, experts.router[name].clone())
    return Method(
        nn.Sequential(wrapped),
        lambda layer, name, x: wrapped.decide(x),
        experts.count,
        [wrapped.classifier],
        peer=True,
    )


def mergoo(base: nn.Module, experts: Experts, case: Case) -> Method:
    """Replace the base's linear layers by mergoo's layer of LoRA experts, from its package."""
    layer_class = moe_layer_class()
    adapter = {
        "r": experts.rank,
        "lora_alpha": experts.rank,
        "lora_dropout": 0.0,
        "init_lora_weights": False,
        "use_rslora": False,
        "use_dora": False,
    }
    trains = []
    for name in experts.names:
        parent_name, _, last = name.rpartition(".")
        parent = base.get_submodule(parent_name)
        linear = getattr(parent, last)
        config = SimpleNamespace(
            num_experts=experts.count,
            num_experts_per_tok=case.active,
            hidden_size=linear.in_features,  # the width of its gate
            adapter_configs=[adapter] * experts.count,
        )
        layer = layer_class(config, linear.in_features, linear.out_features, bias=False)
        layer.to(DTYPE).requires_grad_(False)
        layer.base_layer = linear
        layer.gate.weight = nn.Parameter(experts.router[name].clone())
        trains.append(layer.gate.weight)
        setattr(parent, last, layer)
    _fill(base, experts)

    def gates(layer: Any, name: str, x_NI: Tensor) -> Tensor:
        return _top(layer.gate(x_NI), case.active)

    return Method(base, gates, experts.count, trains, peer=True)


def _top(scores_NE: Tensor, count: int) -> Tensor:
    """Return the softmax over the highest scores, zero elsewhere; the choice is made in the scores' dtype."""
    values, chosen = torch.topk(scores_NE, count, dim=-1)
    masked_NE = torch.full_like(scores_NE, -math.inf, dtype=torch.float32).scatter(-1, chosen, values.float())
    return masked_NE.softmax(dim=-1)


PEERS = {"PEFT X-LoRA": xlora, "PEFT Arrow": arrow, "mergoo": mergoo}
