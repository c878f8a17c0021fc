"""From scores to gates: activation, selection, renormalisation, straight-through. Pure functions.

Letters: B batch, T sequence, E experts, X columns (routed experts plus the null expert), K top-k.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..routing.context import Routing
from .settings import RouterSettings

# On a CPU a softmax along the last axis is several times slower than one across, where rows are this short.
_SHORT_ROW, _MANY_ROWS = 16, 64


def _softmax(logits: Tensor) -> Tensor:
    columns = logits.shape[-1]
    across = columns < _SHORT_ROW and logits.is_cpu and logits.numel() >= _MANY_ROWS * columns
    if across and not torch.compiler.is_compiling():
        return logits.transpose(-1, -2).softmax(-2).transpose(-1, -2)
    return logits.softmax(-1)


SCORING_FUNCS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": _softmax,
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
    if settings.temperature != 1.0:
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
    masked_columns: tuple[int, ...] = (),
    score_scale: float = 1.0,
) -> Routing:
    """Decide by scores that are divided by the temperature already: those of a :class:`Routing`.

    Args:
        logits_BTX: those scores; the decision keeps them as they are.
        settings, bias_X, real_BT: as in :func:`select`.
        masked_columns: columns that get no mass; the selection and the normalisation run over the others.
        score_scale: what the scores are multiplied by.
    """
    masked = settings.missing_columns
    if masked_columns:
        masked = tuple(sorted({*masked, *masked_columns}))
    scores_BTX = logits_BTX if score_scale == 1 else logits_BTX * score_scale
    if masked and (masked_columns or score_scale != 1):
        # Below the scores of everything else, also of experts that a label rules out.
        lowest = _ABSENT if len(masked) == settings.num_columns else -math.inf
        scores_BTX = scores_BTX.index_fill(-1, constant(masked, scores_BTX.device), lowest)
    if masked_columns and bias_X is not None:
        bias_X = bias_X.index_fill(-1, constant(masked, bias_X.device), -math.inf)
    # Straight-through gates have gradients at the experts that were left out, too.
    through = settings.straight_through and scores_BTX.requires_grad and torch.is_grad_enabled()
    if settings.is_sparse and settings.topk_method == "greedy" and not through:
        chosen = _keep_k(scores_BTX, settings, bias_X, masked if masked_columns else ())
    else:
        chosen = _dense(scores_BTX, settings, bias_X, real_BT, masked)
    chosen.logits = logits_BTX
    return chosen


def _keep_k(
    scores_BTX: Tensor, settings: RouterSettings, bias_X: Tensor | None, masked: tuple[int, ...]
) -> Routing:
    """Each token's k columns by their numbers; nothing of the size of X is kept for the backward pass."""
    k = settings.top_k or settings.num_columns
    scoring = SCORING_FUNCS[settings.scoring_func]
    if bias_X is not None:
        dense_BTX = scoring(scores_BTX)
        ids_BTK = (dense_BTX + bias_X).topk(k, dim=-1).indices
        kept_BTK = dense_BTX.gather(-1, ids_BTK)
    else:
        # By the scores: large ones are all 1.0 after a sigmoid, and would tie.
        kept_BTK, ids_BTK = scores_BTX.topk(k, dim=-1)
        if settings.scoring_func == "softmax" and not settings.norm_topk_prob:
            kept_BTK = scoring(scores_BTX).gather(-1, ids_BTK)
        else:
            # The softmax of the kept is the softmax of all, divided by the sum of the kept.
            kept_BTK = scoring(kept_BTK)
    selected_BTX, columns = None, settings.num_columns
    if masked:
        # Fewer than k columns may be open.
        masked_X = constant(masked, ids_BTK.device)
        kept_BTK = kept_BTK.masked_fill(torch.isin(ids_BTK, masked_X), 0.0)
        selected_BTX = _marked(scores_BTX, ids_BTK).index_fill(-1, masked_X, False)
    if settings.norm_topk_prob and (settings.scoring_func != "softmax" or bias_X is not None):
        kept_BTK = _normalised(kept_BTK)
    if settings.scaling_factor != 1.0:
        kept_BTK = kept_BTK * settings.scaling_factor
    if settings.null_expert:
        kept_BTK = kept_BTK.masked_fill(ids_BTK == len(settings.routed), 0.0)
    if settings.shared:
        # Without shared experts the columns already are the experts' numbers, and the null expert's is E.
        selected_BTX = _marked(scores_BTX, ids_BTK) if selected_BTX is None else selected_BTX
        experts_X = constant((*settings.routed, settings.num_experts), ids_BTK.device)
        shared_K = constant(settings.shared, ids_BTK.device).expand(*ids_BTK.shape[:-1], -1)
        ids_BTK = torch.cat([experts_X[ids_BTK], shared_K], dim=-1)
        kept_BTK = torch.cat([kept_BTK, torch.ones_like(shared_K, dtype=kept_BTK.dtype)], dim=-1)
        columns = 0
    return Routing(
        selected=selected_BTX,
        expert_ids=ids_BTK,
        expert_weights=kept_BTK,
        experts=settings.num_experts,
        columns=columns,
        may_select_null=settings.null_expert,
    )


def _marked(scores_BTX: Tensor, ids_BTK: Tensor) -> Tensor:
    return torch.zeros_like(scores_BTX, dtype=torch.bool).scatter_(-1, ids_BTK, True)


def _dense(
    scores_BTX: Tensor,
    settings: RouterSettings,
    bias_X: Tensor | None,
    real_BT: Tensor | None,
    masked: tuple[int, ...],
) -> Routing:
    """All columns' weights, with zeros where the selection has no fixed size."""
    dense_BTX = SCORING_FUNCS[settings.scoring_func](scores_BTX)
    masked_X = constant(masked, dense_BTX.device) if masked else None
    if masked_X is not None and (len(masked) == settings.num_columns or settings.scoring_func == "none"):
        dense_BTX = dense_BTX.index_fill(-1, masked_X, 0.0)
    weights_BTX, selected_BTX = dense_BTX, None
    if settings.is_sparse:
        selected_BTX = _selected(scores_BTX, dense_BTX, settings, bias_X, real_BT)
        if masked_X is not None:
            selected_BTX = selected_BTX.index_fill(-1, masked_X, False)
        weights_BTX = torch.where(selected_BTX, dense_BTX, torch.zeros_like(dense_BTX))
    if settings.norm_topk_prob and (settings.is_sparse or settings.scoring_func != "softmax"):
        weights_BTX = _normalised(weights_BTX)
    if settings.straight_through:
        soft_BTX = _normalised(dense_BTX) if settings.norm_topk_prob else dense_BTX
        weights_BTX = weights_BTX.detach() + (soft_BTX - soft_BTX.detach())
    if settings.scaling_factor != 1.0:
        weights_BTX = weights_BTX * settings.scaling_factor
    return Routing(_as_gates(weights_BTX, settings), selected=selected_BTX)


def _selected(
    logits_BTX: Tensor,
    dense_BTX: Tensor,
    settings: RouterSettings,
    bias_X: Tensor | None,
    real_BT: Tensor | None,
) -> Tensor:
    if settings.topk_method == "top_p":
        return _top_p(dense_BTX, float(settings.top_p or 1.0))
    k = settings.top_k or settings.num_columns
    if settings.topk_method == "expert_choice":
        return _expert_choice(dense_BTX, k, real_BT)
    ranking_BTX = logits_BTX if bias_X is None else dense_BTX + bias_X
    ids_BTK = ranking_BTX.topk(k, dim=-1).indices
    return _marked(dense_BTX, ids_BTK)


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
    if not settings.shared:
        return weights_BTX[..., : settings.num_experts] if settings.null_expert else weights_BTX
    routed = settings.routed
    parts = dict(zip(routed, weights_BTX.unbind(-1), strict=False))
    ones = torch.ones_like(weights_BTX[..., 0]) if routed or settings.null_expert else None
    columns = [parts.get(index, ones) for index in range(settings.num_experts)]
    return torch.stack([c for c in columns if c is not None], dim=-1)


def _normalised(weights_BTX: Tensor) -> Tensor:
    # Sigmoid weights can all be zero in float32; the floor keeps such a row at zero, not NaN.
    total = weights_BTX.sum(dim=-1, keepdim=True)
    return weights_BTX / total.clamp_min(torch.finfo(weights_BTX.dtype).tiny)
