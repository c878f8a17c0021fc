"""Sparse mixtures over sorted tokens: shrink to the chosen ranks, expand back into the token's row.

``shrink`` gathers a block's rows as it loads them and multiplies them by one expert's slab. Its epilogue
applies the gate (forward), or computes the gradients of the gate and of h together (backward). ``expand``
runs one pass per slot, which adds to each token's row once; the last pass adds the base.

Letters: N tokens, D width of the rows (in or out), R total rank, K slots of a token, Q ranks saved per slot.
"""

# Triton's decorators are untyped, and a kernel's arguments are pointers without a Python type.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import RankTables, Tiles, precision, product, rows_of
from .schedule import Schedule


def rows_per_block(tokens: int, experts: int) -> int:
    """Return the number of tokens per program: near an expert's average, within the limits of a tile."""
    return int(min(64, max(16, triton.next_power_of_2(tokens // experts + 1))))


def shrink_tiles(dtype: torch.dtype, rows: int, ranks: int) -> Tiles:
    """Return the tile sizes of ``shrink``."""
    depth = (128 if ranks <= 32 else 64) // (2 if dtype == torch.float32 else 1)
    return Tiles(rows, ranks, depth, 4, 4 if rows <= 32 else 3)


def expand_tiles(dtype: torch.dtype, rows: int, ranks: int) -> Tiles:
    """Return the tile sizes of ``expand``."""
    if dtype == torch.float32:
        return Tiles(rows, 32 if ranks > 16 else 64, ranks, 8, 2)
    return Tiles(rows, 128 if ranks <= 64 else 64, ranks, 4, 2)


def shrink(
    x_ND: Tensor,
    W_RD: Tensor,
    weights_NK: Tensor,
    schedule: Schedule,
    tables: RankTables,
    *,
    keep: bool = False,
    h_NKQ: Tensor | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Multiply each token's row by its chosen experts' rows of W.

    Args:
        x_ND: the layer's input, or the gradient of its output, [N, D].
        W_RD: A, or B, [R, D].
        weights_NK: gates of the chosen experts, float32 [N, K].
        schedule: the sorted tokens.
        tables: the rank map's tables.
        keep: also return the products without their gates, for the backward pass.
        h_NKQ: the products that the forward pass kept; with them the backward epilogue runs.
        tiles: tile sizes; None takes the default ones.

    Returns:
        Forward: gated products [N, K, Q] in the dtype of ``x_ND``, and the products without gates or None.
        Backward: the gradients of h, [N, K, Q], and of the gates, float32 [N, K].
    """
    x_ND, weights_NK = rows_of(x_ND), weights_NK.contiguous()
    (tokens, width), slots = x_ND.shape, weights_NK.shape[1]
    tiles = tiles or shrink_tiles(x_ND.dtype, schedule.rows, tables.tile)
    out_NKQ = x_ND.new_empty(tokens, slots, tables.widest)
    backward = h_NKQ is not None
    second = out_NKQ
    if backward:
        second = torch.empty_like(weights_NK)
    elif keep:
        second = torch.empty_like(out_NKQ)
    _shrink[(schedule.blocks, slots)](
        x_ND, W_RD, weights_NK, h_NKQ if h_NKQ is not None else out_NKQ, out_NKQ, second, schedule.order,
        schedule.groups, tables.starts, tables.scaling, x_ND.stride(0), W_RD.stride(0), slots, tables.experts,
        tables.widest, WIDTH=width, BACKWARD=backward, KEEP=keep, ROWS=schedule.rows, RANKS=tables.tile,
        DEPTH=tiles.depth, PRECISION=precision(x_ND.dtype), **tiles.launch,
    )  # fmt: skip
    return out_NKQ, second if backward or keep else None


def expand(
    h_NKQ: Tensor,
    W_RD: Tensor,
    schedule: Schedule,
    tables: RankTables,
    base_ND: Tensor | None,
    *,
    tiles: Tiles | None = None,
) -> Tensor:
    """Return ``base + Σ_k h[:, k] W[ranks of the k-th expert]``, [N, D]; arguments as in :func:`shrink`."""
    tokens, slots, _ = h_NKQ.shape
    width = W_RD.shape[1]
    tiles = tiles or expand_tiles(h_NKQ.dtype, schedule.rows, tables.tile)
    base_ND = None if base_ND is None else rows_of(base_ND)
    out_ND = (h_NKQ if base_ND is None else base_ND).new_empty(tokens, width)
    for slot in range(slots):
        adds_base = base_ND is not None and slot == slots - 1
        _expand[(triton.cdiv(width, tiles.columns), schedule.blocks)](
            h_NKQ, W_RD, base_ND if base_ND is not None else out_ND, out_ND, schedule.order, schedule.groups,
            tables.starts, W_RD.stride(0), base_ND.stride(0) if base_ND is not None else 0, width, slots,
            slot, tables.experts, tables.widest, ADD=slot > 0, BASE=adds_base, ROWS=schedule.rows,
            RANKS=tables.tile, COLUMNS=tiles.columns, EVEN=width % tiles.columns == 0,
            PRECISION=precision(h_NKQ.dtype), **tiles.launch,
        )  # fmt: skip
    return out_ND


@triton.jit
def _shrink(
    x, w, weights, saved, out, second, order, groups, starts, scaling, x_stride, w_stride, slots, experts,
    widest, WIDTH: tl.constexpr, BACKWARD: tl.constexpr, KEEP: tl.constexpr, ROWS: tl.constexpr,
    RANKS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(1)
    block = slot * tl.num_programs(0) + tl.program_id(0)
    group = tl.load(groups + block)
    if group > experts:
        return
    token = tl.load(order + block * ROWS + tl.arange(0, ROWS))
    live = token >= 0
    token = tl.where(live, token, 0).to(tl.int64)
    start = tl.load(starts + group)
    ranks = tl.load(starts + group + 1) - start
    rank = tl.arange(0, RANKS)
    column = tl.arange(0, DEPTH)
    is_rank = rank < ranks
    x_at = x + token[:, None] * x_stride + column[None, :]
    w_at = w + (start + rank).to(tl.int64)[None, :] * w_stride + column[:, None]
    sums = tl.zeros([ROWS, RANKS], tl.float32)
    if ranks > 0:
        for done in range(0, WIDTH, DEPTH):
            if WIDTH % DEPTH == 0:
                x_tile = tl.load(x_at + done, mask=live[:, None], other=0.0)
                w_tile = tl.load(w_at + done, mask=is_rank[None, :], other=0.0)
            else:
                inside = column < WIDTH - done
                x_tile = tl.load(x_at + done, mask=live[:, None] & inside[None, :], other=0.0)
                w_tile = tl.load(w_at + done, mask=is_rank[None, :] & inside[:, None], other=0.0)
            sums = product(x_tile, w_tile, sums, PRECISION)
    sums = tl.where(is_rank[None, :], sums, 0.0)  # padding must stay zero where a row holds inf or nan
    scale = tl.load(scaling + group)
    pair = token * slots + slot
    gate = tl.load(weights + pair, mask=live, other=0.0).to(tl.float32) * scale
    position = pair[:, None] * widest + rank[None, :]
    mask = live[:, None] & (rank < widest)[None, :]
    if BACKWARD:
        h = tl.load(saved + position, mask=mask, other=0.0).to(tl.float32)
        tl.store(second + pair, tl.sum(sums * h, axis=1) * scale, mask=live)
    if KEEP:
        tl.store(second + position, sums.to(second.dtype.element_ty), mask=mask)
    tl.store(out + position, (sums * gate[:, None]).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _expand(
    h,
    w,
    base,
    out,
    order,
    groups,
    starts,
    w_stride,
    base_stride,
    width,
    slots,
    slot,
    experts,
    widest,
    ADD: tl.constexpr,
    BASE: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = slot * tl.num_programs(1) + tl.program_id(1)
    group = tl.load(groups + block)
    if group > experts:
        return
    token = tl.load(order + block * ROWS + tl.arange(0, ROWS))
    live = token >= 0
    token = tl.where(live, token, 0).to(tl.int64)
    start = tl.load(starts + group)
    ranks = tl.load(starts + group + 1) - start
    rank = tl.arange(0, RANKS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_rank = rank < ranks
    position = (token * slots + slot)[:, None] * widest + rank[None, :]
    h_tile = tl.load(h + position, mask=live[:, None] & is_rank[None, :], other=0.0)
    w_at = w + (start + rank).to(tl.int64)[:, None] * w_stride + column[None, :]
    mask = live[:, None]
    w_mask = is_rank[:, None]
    if not EVEN:
        mask = mask & (column < width)[None, :]
        w_mask = w_mask & (column < width)[None, :]
    w_tile = tl.load(w_at, mask=w_mask, other=0.0)
    sums = product(h_tile, w_tile, tl.zeros([ROWS, COLUMNS], tl.float32), PRECISION)
    at = token[:, None] * width + column[None, :]
    if ADD:
        sums += tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
    if BASE:
        base_at = base + token[:, None] * base_stride + column[None, :]
        sums += tl.load(base_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=mask)
