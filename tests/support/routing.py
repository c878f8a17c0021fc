"""The routings under test, and routers set to known weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from peft_moe.routers import Router

from .bases import ARCHITECTURES, BASES

RUNNING = {"router_granularity": "running", "router_window": 2.0}
# Every scope, granularity and place of the tap that the core offers.
ROUTINGS: dict[str, dict[str, Any]] = {
    "uniform": {"router": "uniform"},
    "dense": {"router": "linear"},
    "top2": {"router": "linear", "top_k": 2},
    "random": {"router": "random"},
    "block": {"router": "linear", "router_scope": "block"},
    "token-probe": {"router": "linear", "router_scope": "model", "router_below_tap": "probe"},
    "token-base": {"router": "linear", "router_scope": "model", "router_below_tap": "base"},
    "prompt-probe": {"router": "context", "router_below_tap": "probe"},
    "prompt-base": {"router": "context", "router_below_tap": "base"},
    # Soft gates per prompt: where "context" would choose alike, these still differ.
    "prompt-soft": {
        "router": "linear",
        "router_scope": "model",
        "router_granularity": "sequence",
        "null_expert": True,
    },
    # One decision per prompt in every module (MoLE) and block (SMEAR).
    "prompt-module": {"router": "mole"},
    "prompt-block": {"router": "smear"},
    # Above the tap by the token, below it by the prompt.
    "token-prompt": {"router": "linear", "router_scope": "model", "router_below_tap": "prompt"},
    # From the prompt, then with the text: by its own probe, within the pass, in every block.
    "running-probe": {"router": "linear", "router_scope": "model", **RUNNING},
    "running-base": {"router": "linear", "router_scope": "model", "router_below_tap": "base", **RUNNING},
    "running-block": {"router": "linear", "router_scope": "block", **RUNNING},
    # Other scorers and selections.
    "mlp": {"router": "mlp", "router_hidden_size": 6},
    # 0.9 keeps two experts or more: where every token keeps one alone, its gate is 1 and no router learns.
    "top-p": {"router": "linear", "topk_method": "top_p", "top_p": 0.9},
    "sigmoid-top2": {"router": "deepseek_v3"},
    "static": {"router": "static", "router_scope": "block"},
}
PER_MODULE = ["uniform", "dense", "top2", "random"]


# One of each kind, for architectures that differ from another one in their base only.
ESSENTIAL = ["uniform", "top2", "block", "token-probe", "prompt-base"]
_CORE = list(ROUTINGS)[:11]


def routings_for(architecture: str) -> list[str]:
    """What is tested on this architecture; one decision cannot serve the two texts of a seq2seq."""
    if BASES[architecture].kind == "seq2seq":
        return PER_MODULE
    if architecture == "llama":
        return list(ROUTINGS)
    return _CORE if architecture in {"gpt2", "gemma3"} else ESSENTIAL


PAIRS = [(name, routing) for name in ARCHITECTURES for routing in routings_for(name)]
# Routers whose weights can be set to choose one expert.
GATED = [(name, routing) for name, routing in PAIRS if routing != "uniform"]


def routers(model: nn.Module, adapter: str = "default") -> Iterator[tuple[str, Router]]:
    """Every router of ``adapter``, with its name."""
    for name, module in model.named_modules():
        if isinstance(module, Router) and name.endswith(f"molora_router.{adapter}"):
            yield name, module


def set_routers(model: nn.Module, seed: int = 0, adapter: str = "default") -> None:
    """Random scores of about 1.5, drawn per router: gates far from uniform and from one-hot.

    The null expert is made unlikely, since a batch that takes it throughout would prove little.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, router in routers(model, adapter):
            scale = 1.5 / router.in_features**0.5
            for parameter in router.parameters():
                spread = scale if router.reads_input else 1.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
            if router.settings.top_k == 1:
                bias_of(router).zero_()  # else one expert wins for every prompt
            if router.settings.null_expert:
                bias_of(router)[-1] -= 3


def bias_of(router: Router) -> torch.Tensor:
    """What is added to every token's scores; all that a static router has."""
    last = getattr(router.scorer, "out", router.scorer)
    return last.bias if hasattr(last, "bias") else last.weight


def choose(model: nn.Module, column: int, adapter: str = "default") -> None:
    """Gates of exactly 1 at one column, an expert or the null expert behind the last one."""
    with torch.no_grad():
        for _, router in routers(model, adapter):
            getattr(router.scorer, "out", router.scorer).weight.zero_()
            # exp(-10_000) is 0 in every float, so that softmax is exactly one-hot.
            bias_of(router).fill_(-10_000.0)
            bias_of(router)[column] = 0.0


def permute_columns(model: nn.Module, order: list[int], adapter: str = "default") -> None:
    """Reorder the routers' rows as the experts were reordered; a null expert stays last."""
    with torch.no_grad():
        for _, router in routers(model, adapter):
            rows = order + ([len(order)] if router.settings.null_expert else [])
            for parameter in getattr(router.scorer, "out", router.scorer).parameters():
                parameter.copy_(parameter[rows].clone())
