"""Losses on one layer's decisions: a function ``(routing, weights, context) → scalar`` each.

Letters: B batch, T sequence, X columns (routed experts, plus the null expert), E routed experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ...routing.context import Routing, RoutingContext
from ..settings import RouterSettings
from .registry import register_loss
from .weighting import decision_domains, weighted_mean


def _constant_on_dense_gates(settings: RouterSettings) -> str | None:
    if settings.is_sparse:
        return None
    return (
        "has no effect on dense gates (every expert is always selected, so the loss is constant); set top_k "
        "below the number of experts"
    )


@register_loss(field="router_aux_loss_coef", log="load_balancing_loss", objection=_constant_on_dense_gates)
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
    probabilities_X = weighted_mean(torch.softmax(logits_BTX, dim=-1), weights_BT)
    if routing.selected is None:
        shares_X = torch.ones_like(probabilities_X)
    else:
        shares_X = weighted_mean(routing.selected.to(logits_BTX.dtype), weights_BT)
    return logits_BTX.shape[-1] * (shares_X * probabilities_X).sum()


def _made_for_softmax(settings: RouterSettings) -> str | None:
    if settings.scoring_func == "softmax":
        return None
    return f"is made for softmax scores, not scoring_func={settings.scoring_func!r}; set it to 0"


@register_loss(field="router_z_loss_coef", log="router_z_loss", objection=_made_for_softmax)
def router_z_loss(routing: Routing, weights_BT: Tensor, context: RoutingContext) -> Tensor:
    """Mean of ``logsumexp(logits)²``, which keeps scores small (ST-MoE, arXiv 2202.08906, eq. 5)."""
    squares_BT1 = torch.logsumexp(_logits(routing), dim=-1, keepdim=True).square()
    return weighted_mean(squares_BT1, weights_BT).squeeze(-1)


@register_loss(field="router_entropy_coef", log="router_entropy_loss")
def entropy_loss(routing: Routing, weights_BT: Tensor, context: RoutingContext) -> Tensor:
    """Mean of ``−Σ_e p_e log p_e`` in nats, p the softmax of the scores: 0 to log X.

    With a weight above 0 decisions become sharp, below 0 flat.
    """
    log_BTX = torch.log_softmax(_logits(routing), dim=-1)
    entropy_BT1 = -(log_BTX.exp() * log_BTX).sum(dim=-1, keepdim=True)
    return weighted_mean(entropy_BT1, weights_BT).squeeze(-1)


@register_loss(field="router_label_loss_coef", log="router_label_loss", needs_domains=True)
def label_loss(routing: Routing, weights_BT: Tensor, context: RoutingContext) -> Tensor:
    """Cross-entropy of the scores with the right column of each decision; unknown ones (-1) are skipped.

    Args:
        routing: one layer's decisions.
        weights_BT: from :func:`decision_weights`.
        context: its ``domains``, long [B] or [B, T], say which column is right.
    """
    logits_BTX = _logits(routing)
    target_BT = decision_domains(routing, context)
    if target_BT is None:
        return logits_BTX.sum() * 0.0
    known_BT = (target_BT >= 0).float()
    losses_BT = functional.cross_entropy(
        logits_BTX.flatten(0, 1), target_BT.clamp_min(0).flatten(), reduction="none"
    )
    return weighted_mean(losses_BT.view(target_BT.shape)[..., None], weights_BT * known_BT).squeeze(-1)


@register_loss(
    field="router_lbc_coef",
    log="router_lbc_loss",
    needs_domains=True,
    options={"delta": "router_lbc_delta"},
)
def localised_balancing_loss(
    routing: Routing, weights_BT: Tensor, context: RoutingContext, *, delta: float
) -> Tensor:
    """LoRAMoE's localised balancing constraint, ``Var(Q∘I) / Mean(Q∘I)²`` (arXiv 2312.09979, sec. 3.3).

    Q [X, B] is each column's mean probability over the sequence's real tokens. I is 1−δ for the column of
    the sequence's domain and 1+δ for the others, so that at the minimum the right column gets
    (1+δ)/(1−δ) times what each other one gets. LoRAMoE prints I the other way round, which is the same
    for its two groups of untrained experts, since either may become either type; with experts whose
    domain is known, it would give the right one less. LoRAMoE also sums over tokens; the mean is the
    same where lengths are, and no long sequence looks like a crowd. Unknown domains are left out.

    Args:
        routing: one layer's decisions.
        weights_BT: from :func:`decision_weights`.
        context: its ``domains``, long [B] or [B, T].
        delta: δ.
    """
    logits_BTX = _logits(routing)
    domains_BT = decision_domains(routing, context)
    if domains_BT is None:
        return logits_BTX.sum() * 0.0
    weights_BT = weights_BT * (domains_BT >= 0)
    columns_X = torch.arange(logits_BTX.shape[-1], device=logits_BTX.device)
    importance_BTX = 1 + delta - 2 * delta * (domains_BT[..., None] == columns_X).to(logits_BTX.dtype)
    scaled_BTX = torch.softmax(logits_BTX, dim=-1) * importance_BTX * weights_BT[..., None]
    counts_B = weights_BT.sum(dim=1)
    loads_BX = (scaled_BTX.sum(dim=1) / counts_B.clamp_min(1)[:, None])[counts_B > 0]
    if loads_BX.numel() == 0:
        return logits_BTX.sum() * 0.0
    return loads_BX.var(correction=0) / loads_BX.mean().square()


def _needs_zero_gates(settings: RouterSettings) -> str | None:
    if settings.scoring_func == "relu":
        return None
    return "has no effect where weights sum to a constant or cannot reach zero; set scoring_func='relu'"


@register_loss(field="router_l1_coef", log="router_l1_loss", objection=_needs_zero_gates)
def sparsity_loss(routing: Routing, weights_BT: Tensor, context: RoutingContext) -> Tensor:
    """Mean of the routed experts' gates: the L1 penalty of ReLU gates (ReMoE, arXiv 2412.14711, eq. 7)."""
    return weighted_mean(routing.gates, weights_BT).mean()


def zero_share(routing: Routing, weights_BT: Tensor) -> Tensor:
    """Share of the routed experts' gates that are exactly zero, over the decisions that count."""
    return weighted_mean((routing.gates == 0).float(), weights_BT).mean()


def _logits(routing: Routing) -> Tensor:
    assert routing.logits is not None  # callers filter
    return routing.logits
