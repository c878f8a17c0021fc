"""What one looks at while a router trains: load, entropy, confidence. Pure functions, no gradients.

Letters: B batch, T sequence, E experts, X experts plus the null expert.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..routing.context import Routing, RoutingContext, RoutingRecord
from . import SCORING_FUNCS, RouterSettings
from .losses import decision_weights


def expert_load(routing: Routing, context: RoutingContext) -> Tensor:
    """Share of the gate mass that each expert receives over real tokens, [E], sums to at most 1.

    What is missing from 1 went to the null expert.
    """
    weights_BT = decision_weights(routing, context)
    gates_BTE = routing.gates.detach().float()
    mass_E = (gates_BTE * weights_BT[..., None]).sum(dim=(0, 1))
    return mass_E / weights_BT.sum().clamp_min(1)


def routing_entropy(routing: Routing, context: RoutingContext) -> Tensor:
    """Mean entropy of the softmax of the scores, in [0, 1] (1 = all experts alike), a scalar.

    It is divided by log X; a router with one column has entropy 0.
    """
    if routing.logits is None or routing.logits.shape[-1] == 1:
        return torch.zeros(())
    log_BTX = torch.log_softmax(routing.logits.detach().float(), dim=-1)
    entropy_BT = -(log_BTX.exp() * log_BTX).sum(-1)
    weights_BT = decision_weights(routing, context)
    mean = (entropy_BT * weights_BT).sum() / weights_BT.sum().clamp_min(1)
    return mean / math.log(routing.logits.shape[-1])


def null_load(routing: Routing, context: RoutingContext, settings: RouterSettings) -> Tensor:
    """Mean weight that the null expert was given over real tokens, a scalar; gates leave it out."""
    assert routing.logits is not None  # a router with a null expert scores
    weights_BTX = SCORING_FUNCS[settings.scoring_func](routing.logits.detach())
    if routing.selected is not None:
        weights_BTX = weights_BTX * routing.selected
    null_BT = weights_BTX[..., -1]
    if settings.norm_topk_prob:
        null_BT = null_BT / weights_BTX.sum(-1).clamp_min(torch.finfo(weights_BTX.dtype).tiny)
    counted_BT = decision_weights(routing, context)
    return (null_BT * counted_BT).sum() / counted_BT.sum().clamp_min(1)


def routing_summary(
    record: RoutingRecord,
    expert_names: list[str],
    shared: list[str] | None = None,
    settings: Mapping[str, RouterSettings] | None = None,
) -> dict[str, float]:
    """Load per expert and entropy, each the mean over the routers of the last forward pass.

    Args:
        record: from :func:`peft_moe.record_routing`.
        expert_names: in the mixture's order.
        shared: those of them that are always on, and take nothing from the null expert.
        settings: of the routers, by the names under which they were recorded; without them the null
            expert's load is what the routed experts leave of 1.

    Returns:
        ``{"load/<expert>": share, "load/null": rest, "router_entropy": …}``; empty without decisions.
    """
    context = record.context
    decisions = record.decisions
    if context is None or not decisions:
        return {}
    device = next(iter(decisions.values())).gates.device  # a model may be spread over several
    load_E = torch.stack([expert_load(r, context).to(device) for r in decisions.values()]).mean(0)
    entropy = torch.stack([routing_entropy(r, context).to(device) for r in decisions.values()]).mean()
    summary = {f"load/{name}": value for name, value in zip(expert_names, load_E.tolist(), strict=True)}
    routed = [name for name in expert_names if name not in (shared or [])]
    with_null = {
        n: r for n, r in decisions.items() if r.logits is not None and r.logits.shape[-1] > len(routed)
    }
    if with_null and settings is not None and with_null.keys() <= settings.keys():
        nulls = [null_load(r, context, settings[name]).to(device) for name, r in with_null.items()]
        summary["load/null"] = float(torch.stack(nulls).mean())
    elif with_null:
        summary["load/null"] = max(0.0, 1.0 - sum(summary[f"load/{name}"] for name in routed))
    summary["router_entropy"] = float(entropy)
    return summary
