"""From scores to gates: activation, top-k, renormalisation, straight-through. Pure functions.

Letters: B batch, T sequence, E experts, X experts plus the null expert, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..routing import Routing
from .settings import RouterSettings

SCORING_FUNCS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: torch.softmax(logits, dim=-1),
    "sigmoid": torch.sigmoid,
}


def select(logits_BTX: Tensor, settings: RouterSettings) -> Routing:
    """Turn scores into one decision.

    With ``norm_topk_prob`` the kept weights sum to 1 (Mixtral); without it they keep their share of
    the whole (Switch, arXiv 2101.03961). With ``straight_through`` the gates are the hard ones in the
    forward pass and the dense ones in the backward pass (arXiv 1308.3432), which gives a gradient to
    top-1 gates that are otherwise constant.

    Args:
        logits_BTX: scores, float32 or wider.
        settings: the router's.

    Returns:
        A :class:`Routing` with gates [B, T, E]; the null expert's column is dropped from the gates
        (its weight goes to no expert) and kept in the logits, which are divided by the temperature.
    """
    # From here on "logits" are what the gates are made of: losses and reports see the temperature, too.
    logits_BTX = logits_BTX / settings.temperature
    dense_BTX = SCORING_FUNCS[settings.scoring_func](logits_BTX)
    weights_BTX, selected_BTX = dense_BTX, None
    if settings.top_k is not None and settings.top_k < settings.num_columns:
        # Of the logits: large scores are all 1.0 after a sigmoid, and would tie.
        ids_BTK = logits_BTX.topk(settings.top_k, dim=-1).indices
        selected_BTX = torch.zeros_like(dense_BTX, dtype=torch.bool).scatter_(-1, ids_BTK, True)
        weights_BTX = torch.where(selected_BTX, dense_BTX, torch.zeros_like(dense_BTX))
    if settings.norm_topk_prob:
        weights_BTX = _normalised(weights_BTX)
    if settings.straight_through:
        soft_BTX = _normalised(dense_BTX) if settings.norm_topk_prob else dense_BTX
        weights_BTX = weights_BTX.detach() + (soft_BTX - soft_BTX.detach())
    gates_BTE = weights_BTX[..., : settings.num_experts]
    return Routing(gates=gates_BTE, logits=logits_BTX, selected=selected_BTX)


def _normalised(weights_BTX: Tensor) -> Tensor:
    # Sigmoid weights can all be zero in float32; the floor keeps such a row at zero, not NaN.
    total = weights_BTX.sum(dim=-1, keepdim=True)
    return weights_BTX / total.clamp_min(torch.finfo(weights_BTX.dtype).tiny)
