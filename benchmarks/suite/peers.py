"""Other mixtures of LoRA experts, as installed: PEFT's X-LoRA and Arrow, and mergoo's layer.

Each is given what favours it: adapters in the base's dtype, experts frozen; X-LoRA's single layer without its
second pass of the base; mergoo with a gate of the layer's width, without which it breaks on `down_proj`.
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

from .contestants import Contestant
from .experts import DTYPE, Case, Experts, adapted
from .mergoo import moe_layer_class


def _loras(base: nn.Module, experts: Experts) -> Any:
    """A PEFT model with one LoRA adapter per expert, named "0", "1", …, all frozen."""
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


def arrow(base: nn.Module, experts: Experts, case: Case) -> Contestant:
    """PEFT's Arrow: prototypes from the experts themselves, nothing to train."""
    model = _loras(base, experts)
    settings = ArrowConfig(top_k=case.active, rng_seed=0)
    settings.task_adapter_names = [str(expert) for expert in range(experts.count)]
    config = LoraConfig(r=experts.rank, target_modules=experts.targets, arrow_config=settings)
    model.add_adapter("arrow_router", config, autocast_adapter_dtype=False)
    model.set_adapter("arrow_router")
    model.requires_grad_(False)

    def gates(layer: Any, name: str, x_NI: Tensor) -> Tensor:
        # Softmax over the k prototypes that lie along the input, either way (arXiv 2405.11157).
        scores_NE = (x_NI @ layer.lora_arrow["arrow_router"].prototypes.T).abs()
        return _top(scores_NE, case.active)

    return Contestant(model, gates, experts.count, peer=True)


def xlora(base: nn.Module, experts: Experts, case: Case) -> Contestant:
    """PEFT's X-LoRA as documented: all experts, weighed by a classifier on a first pass of the bare base."""
    if case.width is not None:
        return _xlora_layer(base, experts)
    with tempfile.TemporaryDirectory() as folder:
        _loras(copy.deepcopy(base), experts).save_pretrained(folder)
        base.config.use_cache = False  # it refuses a base that caches
        config = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=base.config.hidden_size,
            adapters={str(expert): f"{folder}/{expert}" for expert in range(experts.count)},
        )
        model = get_peft_model(base, config, autocast_adapter_dtype=False)
    model.to(DTYPE)  # it loads adapters in float32, at twice the traffic
    _fill(model, experts)  # it must be given numbers for names, under which PEFT loses keys on saving
    tuner = model.base_model
    order = {name: number for number, (name, _) in enumerate(adapted(model))}

    def gates(layer: nn.Module, name: str, x_NI: Tensor) -> Tensor:
        return tuner.internal_xlora_scalings[:, :, order[name]].reshape(-1, experts.count)

    trains = list(tuner.internal_xlora_classifier.parameters())
    return Contestant(model, gates, experts.count, trains, caches=False, peer=True)


class _XLoraLayer(nn.Module):
    """X-LoRA's own layer with a classifier on its input, in place of one on the base's last hidden state."""

    def __init__(self, layer: nn.Module, weight_EI: Tensor) -> None:
        super().__init__()
        self.inner = layer
        self.classifier = nn.Parameter(weight_EI)
        self.forward_inner = XLoraLinearLayer(
            model=SimpleNamespace(disabled=False),  # type: ignore[arg-type]  # all that it asks of the tuner
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


def _xlora_layer(base: nn.Module, experts: Experts) -> Contestant:
    loras = _loras(base, experts)
    loras.base_model.set_adapter([str(expert) for expert in range(experts.count)])
    loras.requires_grad_(False)
    (name, layer) = adapted(loras)[0]
    wrapped = _XLoraLayer(layer, experts.router[name].clone())
    return Contestant(
        nn.Sequential(wrapped),
        lambda layer, name, x: wrapped.decide(x),
        experts.count,
        [wrapped.classifier],
        peer=True,
    )


def mergoo(base: nn.Module, experts: Experts, case: Case) -> Contestant:
    """mergoo's layer of LoRA experts, taken from its package, in place of the base's linear layers."""
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
        parent, _, last = name.rpartition(".")
        holder = base.get_submodule(parent)
        linear = getattr(holder, last)
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
        setattr(holder, last, layer)
    _fill(base, experts)

    def gates(layer: Any, name: str, x_NI: Tensor) -> Tensor:
        return _top(layer.gate(x_NI), case.active)

    return Contestant(base, gates, experts.count, trains, peer=True)


def _top(scores_NE: Tensor, count: int) -> Tensor:
    """Softmax over the highest scores, zero elsewhere; scores keep their dtype until the choice is made."""
    values, chosen = torch.topk(scores_NE, count, dim=-1)
    kept_NE = torch.full_like(scores_NE, -math.inf, dtype=torch.float32).scatter(-1, chosen, values.float())
    return kept_NE.softmax(dim=-1)


PEERS = {"PEFT X-LoRA": xlora, "PEFT Arrow": arrow, "mergoo": mergoo}
