"""Kernels for decoding: few tokens, which read only the chosen experts' slabs, by an index on the device.

There are two launches. Their shapes do not depend on the choice, they copy no slab and they never wait for
the host, so that a CUDA graph can hold them. The first launch splits the input's width over programs; the
second one adds their partial sums in a fixed order.

Letters: N tokens, I in, O out, R total rank, K slots of a token.
"""

# Triton's decorators are untyped, and a kernel's arguments are pointers without a Python type.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import RankTables, rows_of

# Elements of a slab that a program reads at once: few, because a decode step is fast with many small readers.
_SLAB, _MIN_PIECE = 2048, 32


def gather_mix(
    x_NI: Tensor,
    A_RI: Tensor,
    B_RO: Tensor,
    expert_ids_NK: Tensor,
    weights_NK: Tensor,
    tables: RankTables,
    base_NO: Tensor,
    *,
    pieces: tuple[int, int] | None = None,
) -> Tensor:
    """Return ``base + Σ_k weight_k · scaling · (x Aᵀ) B`` over each token's chosen experts, without gradient.

    Args:
        x_NI, A_RI, B_RO, base_NO: as in :func:`peft_moe.ops.mix_reference`, all in one dtype.
        expert_ids_NK: chosen experts, in any integer dtype; an id outside [0, E) means no expert.
        weights_NK: gates of the chosen experts.
        tables: the rank map's tables.
        pieces: the width of the input that a program reads, and of the output that it writes.

    Returns:
        [N, O].
    """
    x_NI, base_NO = rows_of(x_NI), rows_of(base_NO)
    expert_ids_NK, weights_NK = expert_ids_NK.contiguous(), weights_NK.contiguous()
    (tokens, width), slots, out_width = x_NI.shape, expert_ids_NK.shape[1], B_RO.shape[1]
    ranks = triton.next_power_of_2(tables.widest)
    piece = max(_MIN_PIECE, _SLAB // ranks)
    piece_in, piece_out = pieces or (piece, piece)
    splits = triton.cdiv(width, piece_in)
    partial = torch.empty(tokens * slots, splits, ranks, dtype=torch.float32, device=x_NI.device)
    out_NO = torch.empty_like(base_NO, memory_format=torch.contiguous_format)
    _partial_h[(splits, tokens * slots)](
        x_NI, A_RI, expert_ids_NK, partial, tables.starts, x_NI.stride(0), A_RI.stride(0), width, slots,
        tables.experts, RANKS=ranks, PIECE=piece_in, num_warps=4,
    )  # fmt: skip
    _gathered[(triton.cdiv(out_width, piece_out), tokens)](
        partial, B_RO, expert_ids_NK, weights_NK, base_NO, out_NO, tables.starts, tables.scaling,
        B_RO.stride(0), base_NO.stride(0), splits, out_width, tables.experts, SLOTS=slots, RANKS=ranks,
        SPLITS=triton.next_power_of_2(splits), PIECE=piece_out, num_warps=4,
    )  # fmt: skip
    return out_NO


@triton.jit
def _partial_h(
    x,
    a,
    ids,
    partial,
    starts,
    x_stride,
    a_stride,
    width,
    slots,
    experts,
    RANKS: tl.constexpr,
    PIECE: tl.constexpr,
):
    split, pair = tl.program_id(0), tl.program_id(1)
    group = tl.load(ids + pair).to(tl.int32)
    group = tl.where((group < 0) | (group >= experts), experts, group)
    start = tl.load(starts + group)
    is_rank = tl.arange(0, RANKS) < tl.load(starts + group + 1) - start
    column = split * PIECE + tl.arange(0, PIECE)
    inside = column < width
    x_piece = tl.load(x + (pair // slots).to(tl.int64) * x_stride + column, mask=inside, other=0.0)
    rank = (start + tl.arange(0, RANKS)).to(tl.int64)
    slab_at = a + rank[:, None] * a_stride + column[None, :]
    slab = tl.load(slab_at, mask=is_rank[:, None] & inside[None, :], other=0.0)
    sums = tl.sum(slab.to(tl.float32) * x_piece.to(tl.float32)[None, :], axis=1)
    sums = tl.where(is_rank, sums, 0.0)
    tl.store(partial + (pair * tl.num_programs(0) + split) * RANKS + tl.arange(0, RANKS), sums)


@triton.jit
def _gathered(
    partial,
    b,
    ids,
    weights,
    base,
    out,
    starts,
    scaling,
    b_stride,
    base_stride,
    splits,
    width,
    experts,
    SLOTS: tl.constexpr,
    RANKS: tl.constexpr,
    SPLITS: tl.constexpr,
    PIECE: tl.constexpr,
):
    token = tl.program_id(1)
    column = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    inside = column < width
    split, rank = tl.arange(0, SPLITS), tl.arange(0, RANKS)
    sums = tl.load(base + token.to(tl.int64) * base_stride + column, mask=inside, other=0.0).to(tl.float32)
    for slot in tl.static_range(SLOTS):
        pair = token * SLOTS + slot
        group = tl.load(ids + pair).to(tl.int32)
        group = tl.where((group < 0) | (group >= experts), experts, group)
        start = tl.load(starts + group)
        is_rank = rank < tl.load(starts + group + 1) - start
        slab_at = b + (start + rank).to(tl.int64)[:, None] * b_stride + column[None, :]
        slab = tl.load(slab_at, mask=is_rank[:, None] & inside[None, :], other=0.0).to(tl.float32)
        parts_at = partial + (pair * splits + split)[:, None] * RANKS + rank[None, :]
        h = tl.sum(tl.load(parts_at, mask=(split < splits)[:, None], other=0.0), axis=0)
        h *= tl.load(weights + pair).to(tl.float32) * tl.load(scaling + group)
        sums += tl.sum(slab * h[:, None], axis=0)
    at = out + token.to(tl.int64) * width + column
    tl.store(at, sums.to(out.dtype.element_ty), mask=inside)
