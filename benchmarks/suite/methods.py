"""The compared methods: the base, a PEFT LoRA of three ranks, the peers, and our mixture by each backend.

Every method has the same experts on a copy of the same base. It also reports the gates that it used at a
layer, so that `parity` can check the sum that it computed.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from peft_moe import MoLoraConfig
from peft_moe.errors import PeftMoeError
from peft_moe.ops import BACKENDS
from peft_moe.routing.context import record_routing

from .experts import Case, Experts, adapted, make_base

GATHER = "gather"
# From a layer, its name and its input [N, I] to the weights of the experts, [N or 1, E].
Gates = Callable[[nn.Module, str, Tensor], Tensor]


@dataclass
class Method:
    """A model to time.

    Attributes:
        model: the model, on its own copy of the base.
        gates: returns the gates of the last pass; None for the base.
        count: the number of experts that it holds, from the first one on.
        trains: parameters of a training step.
        caches: whether it decodes with a KV cache.
        mixes: whether it routes between experts, so that ``trains`` are its routers.
        peer: whether it is another project's mixture of LoRA experts.
        watch: returns a context around a pass; ``gates`` works after it.
    """

    model: nn.Module
    gates: Gates | None = None
    count: int = 0
    trains: list[nn.Parameter] = field(default_factory=list)
    caches: bool = True
    mixes: bool = True
    peer: bool = False
    watch: Callable[[], Any] | None = None


def lora(base: nn.Module, experts: Experts, count: int) -> Method:
    """Make a PEFT LoRA that holds the first experts on its rank axis: their sum with all weights 1."""
    rank = count * experts.rank
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=experts.targets)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    for name, layer in adapted(model):
        A_RI, B_RO = experts.stacked(name, count)
        layer.lora_A["default"].weight.data = A_RI.clone()
        layer.lora_B["default"].weight.data = B_RO.T.contiguous()
    trains = [p for p in model.parameters() if p.requires_grad]
    return Method(model, lambda layer, name, x: x.new_ones(1, count), count, trains, mixes=False)


def mixture(base: nn.Module, experts: Experts, case: Case, **fields: Any) -> Method:
    """Make our mixture, with a linear router for each layer unless ``fields`` say otherwise."""
    config = MoLoraConfig(
        experts=experts.count,
        r=experts.rank,
        lora_alpha=experts.rank,
        target_modules=experts.targets,
        train_experts=False,
        init_weights=False,
        # With top-1, a renormalised gate is always 1 and has no gradient, so it is not renormalised (Switch).
        **{"router": "linear", "top_k": case.top_k, "norm_topk_prob": case.top_k != 1, **fields},
    )
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    for name, layer in adapted(model):
        A_RI, B_RO = experts.stacked(name, experts.count)
        layer.molora_A["default"].weight.data = A_RI.clone()
        layer.molora_B["default"].weight.data = B_RO.clone()
        if "default" in layer.molora_router:
            scorer = layer.molora_router["default"].scorer
            if getattr(scorer, "weight", None) is not None:
                scorer.weight.data.copy_(experts.router[name])
    recorded: dict[str, Any] = {}

    def watch() -> Any:
        context = record_routing()
        recorded["record"] = context.__enter__()
        return context

    def gates(layer: nn.Module, name: str, x_NI: Tensor) -> Tensor:
        # The router of a block is recorded under the block's name, which the layer's name starts with.
        decisions = recorded["record"].decisions
        key = next((key for key in decisions if layer.name.startswith(key)), None) or next(iter(decisions))
        return decisions[key].gates.reshape(-1, experts.count)

    trains = [p for p in model.parameters() if p.requires_grad]
    return Method(model, gates, experts.count, trains, watch=watch)


def backends() -> list[str]:
    """Return the CPU backends that the config can name, without "folded", which needs constant gates."""
    fields = {entry.name for entry in dataclasses.fields(MoLoraConfig)}
    usable = [name for name in BACKENDS if name != "folded" and not name.startswith("triton")]
    return usable if "backend" in fields else []


def own_methods(case: Case) -> dict[str, dict[str, Any]]:
    """Return the fields of our methods: the default, a router per block, and each backend."""
    ours: dict[str, dict[str, Any]] = {"ours": {}}
    if case.width is None:
        ours["ours, router per block"] = {"router_scope": "block"}
    for name in backends():
        # Gather copies the chosen experts' weights for every token, so it serves few tokens.
        if name != GATHER or case.width is None or case.batch * case.tokens == 1:
            ours[f"ours, {name}"] = {"backend": name}
    return ours


def build(case: Case, names: list[str] | None = None) -> tuple[dict[str, Method], dict[str, str], Experts]:
    """Return all methods of a case, or the named ones; the missing ones with reasons; and the experts."""
    from .peers import PEERS

    base = make_base(case)
    experts = Experts(base, case)
    makers: dict[str, Callable[[nn.Module], Method]] = {
        "base": lambda model: Method(model, mixes=False),
        **{
            f"LoRA {label}": lambda model, count=count: lora(model, experts, count)
            for label, count in (("r", 1), ("k·r", case.active), ("E·r", case.experts))
        },
        **{name: lambda model, make=make: make(model, experts, case) for name, make in PEERS.items()},
        **{
            name: lambda model, fields=fields: mixture(model, experts, case, **fields)
            for name, fields in own_methods(case).items()
        },
    }
    methods: dict[str, Method] = {}
    missing: dict[str, str] = {}
    for name, make in makers.items():
        if names is not None and name not in names:
            continue
        try:
            methods[name] = make(copy.deepcopy(base))
        except UnavailableError as reason:
            missing[name] = str(reason)
        except PeftMoeError as reason:
            if "backend" not in own_methods(case).get(name, {}):
                raise
            missing[name] = str(reason)  # this backend cannot serve the mixture
    return methods, missing, experts


class UnavailableError(Exception):
    """A method cannot run here; the message gives the reason."""


def dtypes_of(model: nn.Module) -> set[torch.dtype]:
    """Return the dtypes of the experts' factors."""
    words = ("lora_A", "lora_B", "molora_A", "molora_B")
    return {p.dtype for name, p in model.named_parameters() if any(word in name for word in words)}


__all__ = ["Method", "UnavailableError", "build", "lora", "mixture", "own_methods"]
