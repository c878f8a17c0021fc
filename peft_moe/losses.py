"""Losses on routing decisions: per layer, over real tokens only, then the mean over layers.

Pooling layers before the product, as is often done, hides collapse: four layers that each use one
expert of four score a perfect 1.0 together, and 4.0 when each is judged by itself.

Letters: B batch, T sequence, X experts plus the null expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .routing import Routing, RoutingContext, RoutingRecord

LossFn = Callable[[Routing, Tensor, RoutingContext], Tensor]


def decision_weights(routing: Routing, context: RoutingContext) -> Tensor:
    """1 where a decision concerns a real token, 0 where it concerns padding: [B|1, T|1] float32.

    A decision for a whole sequence counts once if any of its tokens is real.
    """
    scored = routing.logits if routing.logits is not None else routing.gates
    rows, columns = scored.shape[:2]
    if context.real is None or rows * columns == 1:
        return scored.new_ones(rows, columns, dtype=torch.float32)
    real_BT = context.real.to(scored.device)
    if real_BT.shape == (rows, columns):
        return real_BT.float()
    if columns == 1 and rows == real_BT.shape[0]:
        return real_BT.any(dim=1, keepdim=True).float()
    if real_BT.numel() == rows * columns:
        return real_BT.reshape(rows, columns).float()
    # A module that sees a subset of the tokens (the experts of a sparse base): no padding is known.
    return scored.new_ones(rows, columns, dtype=torch.float32)


def load_balancing_loss(routing: Routing, weights_BT: Tensor, context: RoutingContext) -> Tensor:
    """``X · Σ_e f_e P_e`` (Switch, arXiv 2101.03961, eq. 4, extended to top-k as in Mixtral).

    f_e is the share of decisions that selected e, P_e its mean probability. Balanced routing scores
    k, its minimum; collapse onto the same k experts scores up to X. Dense gates have f = 1
    everywhere, hence no gradient: the config refuses that combination.

    Args:
        routing: one layer's decisions, with logits [B, T, X].
        weights_BT: from :func:`decision_weights`.
        context: unused.
    """
    logits_BTX = _logits(routing)
    probabilities_X = _mean(torch.softmax(logits_BTX, dim=-1), weights_BT)
    if routing.selected is None:
        shares_X = torch.ones_like(probabilities_X)
    else:
        shares_X = _mean(routing.selected.to(logits_BTX.dtype), weights_BT)
    return logits_BTX.shape[-1] * (shares_X * probabilities_X).sum()


def router_z_loss(routing: Routing, weights_BT: Tensor, context: RoutingContext) -> Tensor:
    """Mean of ``logsumexp(logits)²``, which keeps scores small (ST-MoE, arXiv 2202.08906, eq. 5)."""
    squares_BT1 = torch.logsumexp(_logits(routing), dim=-1, keepdim=True).square()
    return _mean(squares_BT1, weights_BT).squeeze(-1)


def label_loss(routing: Routing, weights_BT: Tensor, context: RoutingContext) -> Tensor:
    """Cross-entropy of the scores with the right expert of each sequence; unknown ones (-1) are skipped.

    Args:
        routing: one layer's decisions.
        weights_BT: from :func:`decision_weights`.
        context: its ``domains``, long [B], say which column is right.
    """
    logits_BTX = _logits(routing)
    domains_B = context.domains
    if domains_B is None or logits_BTX.shape[0] != domains_B.shape[0]:
        return logits_BTX.sum() * 0.0
    domains_B = domains_B.to(logits_BTX.device)
    known_B1 = (domains_B >= 0).float()[:, None]
    target_BT = domains_B.clamp_min(0)[:, None].expand(logits_BTX.shape[:2])
    losses_BT = functional.cross_entropy(logits_BTX.flatten(0, 1), target_BT.flatten(), reduction="none")
    return _mean(losses_BT.view(target_BT.shape)[..., None], weights_BT * known_B1).squeeze(-1)


# Config field -> loss. A new loss is one function and one line here.
LOSSES: dict[str, LossFn] = {
    "router_aux_loss_coef": load_balancing_loss,
    "router_z_loss_coef": router_z_loss,
    "router_label_loss_coef": label_loss,
}


def auxiliary_losses(record: RoutingRecord, names: list[str]) -> dict[str, Tensor]:
    """Un-weighted losses of the last forward pass, each the mean over its routers.

    Args:
        record: from :func:`peft_moe.record_routing`.
        names: keys of :data:`LOSSES`.

    Returns:
        name to scalar; empty where no router scored anything.
    """
    context = record.context
    scored = [routing for routing in record.decisions.values() if routing.logits is not None]
    if context is None or not scored:
        return {}
    device = scored[0].gates.device  # a model may be spread over several
    return {
        name: torch.stack(
            [LOSSES[name](r, decision_weights(r, context), context).to(device) for r in scored]
        ).mean()
        for name in names
    }


def _logits(routing: Routing) -> Tensor:
    assert routing.logits is not None  # callers filter
    return routing.logits


def _mean(values_BTX: Tensor, weights_BT: Tensor) -> Tensor:
    total_X = (values_BTX * weights_BT[..., None]).sum(dim=(0, 1))
    return total_X / weights_BT.sum().clamp_min(1)
