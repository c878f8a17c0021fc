"""Who is compared: the base, one PEFT LoRA of three ranks, the peers, and our mixture by each backend.

Every contestant carries the same experts on a copy of the same base. It also says which gates it used at a
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
# The layer, its name and its input [N, I] to weights of the experts, [N or 1, E].
Gates = Callable[[nn.Module, str, Tensor], Tensor]


@dataclass
class Contestant:
    """One model to time.

    Attributes:
        model: on its own copy of the base.
        gates: what it decided; None for the base.
        count: how many of the experts it holds, from the first.
        trains: parameters of a training step.
        caches: whether it decodes with a KV cache.
        mixes: whether it routes between experts; what it trains is then its routers.
        peer: another project's mixture of LoRA experts.
        watch: a context around a pass after which ``gates`` may be asked.
    """

    model: nn.Module
    gates: Gates | None = None
    count: int = 0
    trains: list[nn.Parameter] = field(default_factory=list)
    caches: bool = True
    mixes: bool = True
    peer: bool = False
    watch: Callable[[], Any] | None = None


def lora(base: nn.Module, experts: Experts, count: int) -> Contestant:
    """One PEFT LoRA that holds the first experts on its rank axis: what they add up to with weights 1."""
    rank = count * experts.rank
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=experts.targets)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    for name, layer in adapted(model):
        A_RI, B_RO = experts.stacked(name, count)
        layer.lora_A["default"].weight.data = A_RI.clone()
        layer.lora_B["default"].weight.data = B_RO.T.contiguous()
    trains = [p for p in model.parameters() if p.requires_grad]
    return Contestant(model, lambda layer, name, x: x.new_ones(1, count), count, trains, mixes=False)


def mixture(base: nn.Module, experts: Experts, case: Case, **fields: Any) -> Contestant:
    """Our mixture, with a linear router for each layer unless ``fields`` say otherwise."""
    config = MoLoraConfig(
        experts=experts.count,
        r=experts.rank,
        lora_alpha=experts.rank,
        target_modules=experts.targets,
        train_experts=False,
        init_weights=False,
        # A single gate divided by itself is 1 and teaches nothing: top-1 keeps its share, as in Switch.
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
        # A router of a block or of the model is recorded under its own name, of which a layer's is a branch.
        decisions = recorded["record"].decisions
        key = next((key for key in decisions if layer.name.startswith(key)), None) or next(iter(decisions))
        return decisions[key].gates.reshape(-1, experts.count)

    trains = [p for p in model.parameters() if p.requires_grad]
    return Contestant(model, gates, experts.count, trains, watch=watch)


def backends() -> list[str]:
    """Ways to compute a mixture on a CPU that the config may ask for; gates to fold do not occur."""
    known = {entry.name for entry in dataclasses.fields(MoLoraConfig)}
    usable = [name for name in BACKENDS if name != "folded" and not name.startswith("triton")]
    return usable if "backend" in known else []


def own(case: Case) -> dict[str, dict[str, Any]]:
    """Our contestants: as users get it, with a router per block, and by each backend."""
    ours: dict[str, dict[str, Any]] = {"ours": {}}
    if case.width is None:
        ours["ours, router per block"] = {"router_scope": "block"}
    for name in backends():
        # It copies the chosen experts' weights for every token: made for few of them.
        if name != GATHER or case.width is None or case.batch * case.tokens == 1:
            ours[f"ours, {name}"] = {"backend": name}
    return ours


def build(
    case: Case, names: list[str] | None = None
) -> tuple[dict[str, Contestant], dict[str, str], Experts]:
    """All contestants of a case, or those named; why others are missing; and the experts that they hold."""
    from .peers import PEERS

    base = make_base(case)
    experts = Experts(base, case)
    makers: dict[str, Callable[[nn.Module], Contestant]] = {
        "base": lambda model: Contestant(model, mixes=False),
        **{
            f"LoRA {label}": lambda model, count=count: lora(model, experts, count)
            for label, count in (("r", 1), ("k·r", case.active), ("E·r", case.experts))
        },
        **{name: lambda model, make=make: make(model, experts, case) for name, make in PEERS.items()},
        **{
            name: lambda model, fields=fields: mixture(model, experts, case, **fields)
            for name, fields in own(case).items()
        },
    }
    found: dict[str, Contestant] = {}
    missing: dict[str, str] = {}
    for name, make in makers.items():
        if names is not None and name not in names:
            continue
        try:
            found[name] = make(copy.deepcopy(base))
        except UnavailableError as reason:
            missing[name] = str(reason)
        except PeftMoeError as reason:
            if "backend" not in own(case).get(name, {}):
                raise
            missing[name] = str(reason)  # this form serves no such mixture
    return found, missing, experts


class UnavailableError(Exception):
    """A contestant cannot take part here; says why."""


def dtypes_of(model: nn.Module) -> set[torch.dtype]:
    """Of the experts' factors."""
    words = ("lora_A", "lora_B", "molora_A", "molora_B")
    return {p.dtype for name, p in model.named_parameters() if any(word in name for word in words)}


__all__ = ["Contestant", "UnavailableError", "build", "lora", "mixture", "own"]
