"""From scores to gates: activation, selection, renormalisation, straight-through. Pure functions.

Letters: B batch, T sequence, E experts, X columns (routed experts plus the null expert), K top-k.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..routing import Routing
from .settings import RouterSettings

SCORING_FUNCS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: torch.softmax(logits, dim=-1),
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "none": lambda logits: logits,
}
# Far below every score, yet finite: an absent expert's probability is 0, and 0 · log 0 stays 0.
_ABSENT = -1.0e4
_CONSTANTS: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}


def select(
    logits_BTX: Tensor,
    settings: RouterSettings,
    *,
    bias_X: Tensor | None = None,
    real_BT: Tensor | None = None,
) -> Routing:
    """Turn scores into one decision.

    With ``norm_topk_prob`` the kept weights sum to 1 (Mixtral); without it they keep their share of
    the whole (Switch, arXiv 2101.03961). With ``straight_through`` the gates are the hard ones in the
    forward pass and the dense ones in the backward pass (arXiv 1308.3432), which gives a gradient to
    top-1 gates that are otherwise constant.

    Args:
        logits_BTX: scores, float32 or wider.
        settings: the router's.
        bias_X: added to the weights for the choice of the top k, never to the gates themselves: the
            balancing bias of DeepSeek-V3 (arXiv 2408.15664).
        real_BT: False at padding, which must not take an expert's place in "expert_choice".

    Returns:
        A :class:`Routing` with gates [B, T, E]; the null expert's column is dropped from the gates
        (its weight goes to no expert) and kept in the logits, which are divided by the temperature.
        Where every token keeps k columns it also names the experts, for sparse arithmetic.
    """
    # From here on "logits" are what the gates are made of: losses and reports see the temperature, too.
    logits_BTX = logits_BTX / settings.temperature
    absent = settings.missing_columns
    if absent:
        logits_BTX = logits_BTX.index_fill(-1, constant(absent, logits_BTX.device), _ABSENT)
    return choose(logits_BTX, settings, bias_X=bias_X, real_BT=real_BT)


def choose(
    logits_BTX: Tensor,
    settings: RouterSettings,
    *,
    bias_X: Tensor | None = None,
    real_BT: Tensor | None = None,
    closed: tuple[int, ...] = (),
    sharpness: float = 1.0,
) -> Routing:
    """Decide by scores that are divided by the temperature already: those of a :class:`Routing`.

    Args:
        logits_BTX: those scores; the decision keeps them as they are.
        settings, bias_X, real_BT: as in :func:`select`.
        closed: columns that get no mass; the selection and the normalisation run over the others.
        sharpness: what the scores are multiplied by.
    """
    shut = tuple(sorted({*settings.missing_columns, *closed}))
    shut_X = constant(shut, logits_BTX.device)
    nobody = len(shut) == settings.num_columns
    scores_BTX = logits_BTX if sharpness == 1 else logits_BTX * sharpness
    if shut and (closed or sharpness != 1):
        # Below the scores of everything else, also of experts that a label rules out.
        scores_BTX = scores_BTX.index_fill(-1, shut_X, _ABSENT if nobody else -math.inf)
    dense_BTX = SCORING_FUNCS[settings.scoring_func](scores_BTX)
    if shut and (nobody or settings.scoring_func == "none"):
        dense_BTX = dense_BTX.index_fill(-1, shut_X, 0.0)
    weights_BTX, selected_BTX, ids_BTK = dense_BTX, None, None
    if settings.is_sparse:
        bias_X = bias_X if bias_X is None or not closed else bias_X.index_fill(-1, shut_X, -math.inf)
        selected_BTX, ids_BTK = _selected(scores_BTX, dense_BTX, settings, bias_X, real_BT)
        if closed:
            selected_BTX = selected_BTX.index_fill(-1, shut_X, False)
        weights_BTX = torch.where(selected_BTX, dense_BTX, torch.zeros_like(dense_BTX))
    if settings.norm_topk_prob:
        weights_BTX = _normalised(weights_BTX)
    if settings.straight_through:
        soft_BTX = _normalised(dense_BTX) if settings.norm_topk_prob else dense_BTX
        weights_BTX = weights_BTX.detach() + (soft_BTX - soft_BTX.detach())
    gates_BTE = _as_gates(weights_BTX * settings.scaling_factor, settings)
    routing = Routing(gates=gates_BTE, logits=logits_BTX, selected=selected_BTX)
    # Straight-through gates have gradients at the experts that were left out, too.
    if ids_BTK is not None and not (settings.straight_through and gates_BTE.requires_grad):
        routing.expert_ids, routing.expert_weights = _chosen(ids_BTK, gates_BTE, settings)
    return routing


def _selected(
    logits_BTX: Tensor,
    dense_BTX: Tensor,
    settings: RouterSettings,
    bias_X: Tensor | None,
    real_BT: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Which columns are kept, [B, T, X], and their numbers [B, T, K] where they are equally many."""
    if settings.topk_method == "top_p":
        return _top_p(dense_BTX, float(settings.top_p or 1.0)), None
    k = settings.top_k or settings.num_columns
    if settings.topk_method == "expert_choice":
        return _expert_choice(dense_BTX, k, real_BT), None
    # Of the logits: large scores are all 1.0 after a sigmoid, and would tie.
    ranking_BTX = logits_BTX if bias_X is None else dense_BTX + bias_X
    ids_BTK = ranking_BTX.topk(k, dim=-1).indices
    return torch.zeros_like(dense_BTX, dtype=torch.bool).scatter_(-1, ids_BTK, True), ids_BTK


def _chosen(ids_BTK: Tensor, gates_BTE: Tensor, settings: RouterSettings) -> tuple[Tensor, Tensor]:
    """Columns to experts, and those that are always on behind them; a null expert's number is E."""
    if settings.shared:
        # Without shared experts the columns already are the experts' numbers, and the null expert's is E.
        experts_X = constant((*settings.routed, settings.num_experts), ids_BTK.device)
        shared_K = constant(settings.shared, ids_BTK.device).expand(*ids_BTK.shape[:-1], -1)
        ids_BTK = torch.cat([experts_X[ids_BTK], shared_K], dim=-1)
    if not settings.null_expert:
        return ids_BTK, gates_BTE.gather(-1, ids_BTK)
    found_BTK = gates_BTE.gather(-1, ids_BTK.clamp_max(settings.num_experts - 1))
    return ids_BTK, torch.where(ids_BTK < settings.num_experts, found_BTK, 0.0)


def constant(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Whole numbers on a device: made once, since every copy to an accelerator waits for it."""
    found = _CONSTANTS.get((numbers, device))
    if found is None:
        # Made under torch.inference_mode() they could never be used in training afterwards.
        with torch.inference_mode(False):
            found = torch.tensor(numbers, dtype=torch.long, device=device)
        if type(found) is Tensor:  # not what a tracer puts in its place
            _CONSTANTS[numbers, device] = found
    return found


def _top_p(probabilities_BTX: Tensor, mass: float) -> Tensor:
    """The smallest set of columns whose probabilities reach ``mass``; at least one (arXiv 2403.07652)."""
    sorted_BTX, order_BTX = probabilities_BTX.sort(dim=-1, descending=True, stable=True)
    before_BTX = sorted_BTX.cumsum(-1) - sorted_BTX
    kept_BTX = before_BTX < mass * (1 - 1e-6)  # rounding must not add a column that is not needed
    kept_BTX[..., 0] = True
    return torch.zeros_like(kept_BTX).scatter_(-1, order_BTX, kept_BTX)


def _expert_choice(probabilities_BTX: Tensor, k: int, real_BT: Tensor | None) -> Tensor:
    """Each column takes its ⌈k·T/X⌉ best tokens of every sequence (Zhou et al., arXiv 2202.09368).

    Which tokens it takes depends on all tokens of the sequence, so that it suits encoders only.
    """
    batch, length, columns = probabilities_BTX.shape
    if real_BT is None or tuple(real_BT.shape) != (batch, length):
        real_BT = probabilities_BTX.new_ones(batch, length, dtype=torch.bool)
    masked_BTX = probabilities_BTX.masked_fill(~real_BT[..., None], -math.inf)
    order_BTX = masked_BTX.argsort(dim=1, descending=True, stable=True)
    rank_BTX = torch.empty_like(order_BTX).scatter_(
        1, order_BTX, torch.arange(length, device=order_BTX.device)[None, :, None].expand_as(order_BTX)
    )
    places_B = (real_BT.sum(-1) * k / columns).ceil()
    return (rank_BTX < places_B[:, None, None]) & real_BT[..., None]


def _as_gates(weights_BTX: Tensor, settings: RouterSettings) -> Tensor:
    """Columns to experts: the null column is dropped, shared experts weigh 1."""
    routed = settings.routed
    if not settings.shared:
        return weights_BTX[..., : settings.num_experts]
    parts = dict(zip(routed, weights_BTX.unbind(-1), strict=False))
    ones = torch.ones_like(weights_BTX[..., 0]) if routed or settings.null_expert else None
    columns = [parts.get(index, ones) for index in range(settings.num_experts)]
    return torch.stack([c for c in columns if c is not None], dim=-1)


def _normalised(weights_BTX: Tensor) -> Tensor:
    # Sigmoid weights can all be zero in float32; the floor keeps such a row at zero, not NaN.
    total = weights_BTX.sum(dim=-1, keepdim=True)
    return weights_BTX / total.clamp_min(torch.finfo(weights_BTX.dtype).tiny)
