"""Whole feed-forward networks as experts: one branch of the hidden state per chosen expert.

    y = Σ_k w_k · FFN_{e_k}(x),  where Σ_k w_k = 1 and one of the e_k may be "no expert", the base

The input projections expand each token's row into K branches; the output projection combines them. The base's
products are computed once per token: in the input projections all branches share them, and the base's output
projection is applied to Σ_k w_k h_k.

Letters: N tokens, I in, O out, F hidden features, R total rank, E experts, K branches (chosen experts, and
the base where needed).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .mix import mix
from .rank_map import RankMap


def with_base_branch(
    ids_NK: Tensor, weights_NK: Tensor, experts: int, *, in_place: bool
) -> tuple[Tensor, Tensor]:
    """Give the rest of the weights, ``1 - Σ_k w_k``, to the base, so that the branches' weights sum to 1.

    Args:
        ids_NK: numbers of the chosen experts, [N, K] or [1, K]; E stands for "no expert".
        weights_NK: their gates.
        experts: E.
        in_place: if True, "no expert" gets the rest where it is among the chosen, and all other weights stay;
            if False, the rest gets a branch of its own.

    Returns:
        Ids and weights, each [N, K], or [N, K + 1] with a branch of its own.
    """
    rest_N1 = 1.0 - weights_NK.sum(-1, keepdim=True)
    if in_place:
        return ids_NK, torch.where(ids_NK == experts, rest_N1, weights_NK)
    none_N1 = torch.full_like(ids_NK[:, :1], experts)
    return torch.cat([ids_NK, none_N1], dim=-1), torch.cat([weights_NK, rest_N1], dim=-1)


def expand_branches(
    x_NI: Tensor, A_RI: Tensor, B_RO: Tensor, ids_NK: Tensor, ranks: RankMap, base_NO: Tensor, backend: str
) -> Tensor:
    """Compute an input projection for each branch's expert e: ``base + scaling_e · (x Aₑᵀ) Bₑ``.

    Args:
        x_NI: the network's input, [N, I].
        A_RI, B_RO: the experts' factors on one rank axis.
        ids_NK: the expert of each branch, [N, K] or [1, K].
        ranks: the segments of R.
        base_NO: the base layer's output, [N, O].
        backend: as in :func:`~peft_moe.ops.mix`.

    Returns:
        [K, N, O].
    """
    branches, (tokens, width) = ids_NK.shape[1], x_NI.shape
    ids_P1 = _pairs(ids_NK, tokens)
    mixed_PO = mix(
        x_NI.expand(branches, tokens, width).reshape(-1, width),
        A_RI,
        B_RO,
        None,
        ranks,
        base_NO.expand(branches, *base_NO.shape).reshape(-1, base_NO.shape[1]),
        expert_ids_NK=ids_P1,
        weights_NK=torch.ones_like(ids_P1, dtype=torch.float32),
        backend=backend,
    )
    return mixed_PO.view(branches, tokens, -1)


def combine_branches(h_KNF: Tensor, weights_NK: Tensor) -> Tensor:
    """Return ``Σ_k w_k h_k`` [N, F], the input of the base's output projection, in the dtype of ``h_KNF``."""
    weights_KN1 = weights_NK.T.to(h_KNF.dtype)[..., None]
    return (h_KNF * weights_KN1).sum(0)


def combine_branch_deltas(
    h_KNF: Tensor,
    A_RF: Tensor,
    B_RO: Tensor,
    ids_NK: Tensor,
    weights_NK: Tensor,
    ranks: RankMap,
    base_NO: Tensor,
    backend: str,
) -> Tensor:
    """Compute the output projection, ``base + Σ_k w_k · scaling_e · (h_k Aₑᵀ) Bₑ``; e is the branch's expert.

    Args:
        h_KNF: hidden state of each branch, [K, N, F].
        A_RF, B_RO: the experts' factors on one rank axis.
        ids_NK, weights_NK: the branches, [N, K] or [1, K].
        ranks: the segments of R.
        base_NO: the base layer's output for :func:`combine_branches`, [N, O].
        backend: as in :func:`~peft_moe.ops.mix`.

    Returns:
        [N, O].
    """
    branches, tokens, width = h_KNF.shape
    delta_PO = mix(
        h_KNF.reshape(-1, width),
        A_RF,
        B_RO,
        None,
        ranks,
        base_NO.new_zeros(branches * tokens, base_NO.shape[1]),
        expert_ids_NK=_pairs(ids_NK, tokens),
        weights_NK=_pairs(weights_NK, tokens),
        backend=backend,
    )
    return base_NO + delta_PO.view(branches, tokens, -1).sum(0)


def _pairs(values_NK: Tensor, tokens: int) -> Tensor:
    """Return values per pair of branch and token, all tokens of a branch together, [K·N, 1]."""
    return values_NK.expand(tokens, -1).T.reshape(-1, 1)
