"""Mixtures by Triton kernels, with the gradients that router training needs.

The backward pass keeps h at the chosen experts (all of h for dense gates), the gates, and the choice. Experts
are frozen here; other backends train them.

Letters: N tokens, I in, O out, R total rank, E experts, K chosen experts, Q the largest rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..once_differentiable import Gradients, once_differentiable
from ..rank_map import RankMap
from .common import RankTables, rank_tables
from .gather import gather_mix
from .schedule import Schedule, make_schedule
from .sparse import expand, rows_per_block, shrink
from .stacked import stacked_expand, stacked_shrink


def mix_sorted(
    x_NI: Tensor,
    A_RI: Tensor,
    B_RO: Tensor,
    ranks: RankMap,
    base_NO: Tensor,
    ids_NK: Tensor,
    weights_NK: Tensor,
) -> Tensor:
    """Return ``base + Σ_k weight_k · scaling · (x Aᵀ) B``, computed over tokens sorted by expert.

    Args:
        x_NI, A_RI, B_RO: as in :func:`peft_moe.ops.mix`, all in one dtype; N and R at least 1.
        ranks: the segments of R.
        base_NO: output of the base layer; the result has its dtype.
        ids_NK, weights_NK: the chosen experts (E for none) and their gates.

    Returns:
        [N, O].
    """
    weights_NK = weights_NK if torch.is_grad_enabled() else weights_NK.detach()
    out_NO: Tensor = _Sorted.apply(x_NI, A_RI, B_RO, weights_NK, base_NO, ids_NK, ranks)  # type: ignore[no-untyped-call]  # torch's own
    return out_NO


def mix_fused(
    x_NI: Tensor,
    A_RI: Tensor,
    B_RO: Tensor,
    ranks: RankMap,
    base_NO: Tensor,
    gates: Tensor,
    ids_NK: Tensor | None = None,
) -> Tensor:
    """Return ``base + ((x Aᵀ) ∘ gates per rank) B``; the first product's epilogue applies the gates.

    Args:
        x_NI, A_RI, B_RO, ranks, base_NO: as in :func:`mix_sorted`.
        gates: gates of all experts, [N, E] or [1, E]; with ids, those of the chosen experts, [N, K].
        ids_NK: the chosen experts; None for dense gates.

    Returns:
        [N, O].
    """
    gates = gates if torch.is_grad_enabled() else gates.detach()
    out_NO: Tensor = _Fused.apply(x_NI, A_RI, B_RO, gates, base_NO, ids_NK, ranks)  # type: ignore[no-untyped-call]  # torch's own
    return out_NO


def mix_gathered(
    x_NI: Tensor,
    A_RI: Tensor,
    B_RO: Tensor,
    ranks: RankMap,
    base_NO: Tensor,
    ids_NK: Tensor,
    weights_NK: Tensor,
) -> Tensor:
    """Do the same as :func:`mix_sorted` for few tokens, without gradients; read only the chosen experts."""
    return gather_mix(x_NI, A_RI, B_RO, ids_NK, weights_NK, _tables(ranks, x_NI), base_NO)


def _tables(ranks: RankMap, like: Tensor) -> RankTables:
    return rank_tables(ranks.ranks, ranks.scaling, like.device)


class _Sorted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        A_RI: Tensor,
        B_RO: Tensor,
        weights_NK: Tensor,
        base_NO: Tensor,
        ids_NK: Tensor,
        ranks: RankMap,
    ) -> Tensor:
        tables = _tables(ranks, x_NI)
        rows = rows_per_block(len(x_NI), tables.experts)
        schedule = make_schedule(ids_NK, tables.experts, rows)
        for_gates = ctx.needs_input_grad[3]
        hg_NKQ, h_NKQ = shrink(x_NI, A_RI, weights_NK, schedule, tables, keep=for_gates)
        # The sorted order implies the choice, so the ids are not kept.
        ctx.save_for_backward(
            A_RI if ctx.needs_input_grad[0] else None,
            B_RO,
            weights_NK,
            h_NKQ,
            schedule.groups,
            schedule.order,
        )
        ctx.tables, ctx.rows = tables, rows
        return expand(hg_NKQ, B_RO, schedule, tables, base_NO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: Tensor) -> Gradients:
        A_RI, B_RO, weights_NK, h_NKQ, groups, order = ctx.saved_tensors
        schedule, tables = Schedule(groups, order, ctx.rows), ctx.tables
        for_x, for_gates, for_base = (ctx.needs_input_grad[i] for i in (0, 3, 4))
        dx_NI = dweights_NK = None
        if for_x or for_gates:
            dy_cast_NO = dy_NO.to(B_RO.dtype)
            dh_NKQ, dweights_NK = shrink(dy_cast_NO, B_RO, weights_NK, schedule, tables, h_NKQ=h_NKQ)
            dweights_NK = None if dweights_NK is None else dweights_NK.to(weights_NK.dtype)
            dx_NI = expand(dh_NKQ, A_RI, schedule, tables, None) if for_x else None
        return dx_NI, None, None, dweights_NK, dy_NO if for_base else None, None, None


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        A_RI: Tensor,
        B_RO: Tensor,
        gates: Tensor,
        base_NO: Tensor,
        ids_NK: Tensor | None,
        ranks: RankMap,
    ) -> Tensor:
        tables, for_gates = _tables(ranks, x_NI), ctx.needs_input_grad[3]
        hg_NR, h = stacked_shrink(x_NI, A_RI, gates, tables, expert_ids_NK=ids_NK, keep=for_gates)
        ctx.save_for_backward(A_RI if ctx.needs_input_grad[0] else None, B_RO, gates, h, ids_NK)
        ctx.tables = tables
        return stacked_expand(hg_NR, B_RO, base_NO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: Tensor) -> Gradients:
        A_RI, B_RO, gates, h, ids_NK = ctx.saved_tensors
        for_x, for_gates, for_base = (ctx.needs_input_grad[i] for i in (0, 3, 4))
        dx_NI = dgates = None
        if for_x or for_gates:
            dy_cast_NO = dy_NO.to(B_RO.dtype)
            dh_NR, dgates = stacked_shrink(dy_cast_NO, B_RO, gates, ctx.tables, expert_ids_NK=ids_NK, h=h)
            if dgates is not None:
                dgates = dgates.sum(0, keepdim=True) if len(gates) == 1 else dgates
                dgates = dgates.to(gates.dtype)
            dx_NI = dh_NR @ A_RI if for_x else None
        return dx_NI, None, None, dgates, dy_NO if for_base else None, None, None
