"""The stacked backend as kernels: the gates are applied in the epilogue of the A product.

The gated h is thus written once. The backward epilogue computes the gradient of h and, reduced in float32,
the gradient of the gates from one product.

Letters: N tokens, D width of the rows (in or out), R total rank, E experts, K slots of a token, Q ranks
saved per slot.
"""

# Triton's decorators are untyped, and a kernel's arguments are pointers without a Python type.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import MIN_TILE, RankTables, Tiles, precision, product, rows_of


def stacked_tiles(dtype: torch.dtype, tokens: int, total: int, rank: int) -> Tiles:
    """Return the tile sizes of ``stacked_shrink``; a tile holds whole experts if ranks are powers of two."""
    columns = max(min(128, triton.next_power_of_2(total)), triton.next_power_of_2(rank), MIN_TILE)
    rows = 16 if tokens < 1024 else 32 if tokens < 8192 else 64
    if dtype == torch.float32:
        return Tiles(rows, max(min(columns, 64), triton.next_power_of_2(rank)), 32, 4, 3)
    # With four warps, registers spill where the epilogue holds a second tile.
    return Tiles(rows, columns, 128 if columns <= 64 else 64, 8 if columns > 64 else 4, 4)


def add_tiles(dtype: torch.dtype, tokens: int) -> Tiles:
    """Return the tile sizes of ``stacked_expand``."""
    if dtype == torch.float32:
        return Tiles(32, 64, 32, 4, 2)
    return Tiles(64 if tokens <= 1024 else 128, 128, 64, 8, 3)


def stacked_shrink(
    x_ND: Tensor,
    W_RD: Tensor,
    weights: Tensor,
    tables: RankTables,
    *,
    expert_ids_NK: Tensor | None = None,
    keep: bool = False,
    h: Tensor | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return ``(x Wᵀ) ∘ gates per rank``, and the products that the backward pass needs.

    Args:
        x_ND: the layer's input, or the gradient of its output, [N, D].
        W_RD: A, or B, [R, D].
        weights: gates of all experts, [N, E] or [1, E]; with ids, those of the chosen experts, [N, K].
        tables: the rank map's tables.
        expert_ids_NK: the chosen experts; None for dense gates.
        keep: also return the products without gates.
        h: the products that the forward pass kept; with them the backward epilogue runs. It needs equal
            ranks that are powers of two, because an expert must lie within one tile of ranks.
        tiles: tile sizes; None takes the default ones.

    Returns:
        Forward: [N, R], and the kept products or None: [N, R], with ids only the chosen ranks, [N, K, Q].
        Backward: the gradients of h, [N, R], and of the gates, float32 [N, E] or [N, K].
    """
    x_ND, weights = rows_of(x_ND), weights.contiguous()
    (tokens, width), total = x_ND.shape, W_RD.shape[0]
    slots = 0 if expert_ids_NK is None else expert_ids_NK.shape[1]
    tiles = tiles or stacked_tiles(x_ND.dtype, tokens, total, tables.widest)
    out_NR = x_ND.new_empty(tokens, total)
    second = out_NR
    if h is not None:
        # No tile covers a slot without an expert, so the gradients start at zero.
        second = weights.new_zeros(tokens, slots or tables.experts, dtype=torch.float32)
    elif keep:
        second = x_ND.new_empty((tokens, slots, tables.widest) if slots else (tokens, total))
    _gated[(triton.cdiv(total, tiles.columns), triton.cdiv(tokens, tiles.rows))](
        x_ND, W_RD, out_NR if expert_ids_NK is None else expert_ids_NK.contiguous(), weights, h if h is not
        None else out_NR, out_NR, second, tables.owners, tables.starts, tables.scaling, x_ND.stride(0),
        W_RD.stride(0), 0 if weights.shape[0] == 1 and tokens > 1 else weights.shape[1], tokens, total,
        tables.experts, WIDTH=width, SLOTS=slots, WIDEST=tables.widest, BACKWARD=h is not None, KEEP=keep,
        ROWS=tiles.rows, COLUMNS=tiles.columns, DEPTH=tiles.depth, PRECISION=precision(x_ND.dtype),
        **tiles.launch,
    )  # fmt: skip
    return out_NR, second if keep or h is not None else None


def stacked_expand(
    h_NR: Tensor, W_RD: Tensor, base_ND: Tensor, *, in_place: bool = False, tiles: Tiles | None = None
) -> Tensor:
    """Return ``base + h W``, [N, D]; the base is read once and the sum is written once.

    Args:
        h_NR: gated products.
        W_RD: B.
        base_ND: output of the base layer.
        in_place: overwrite ``base_ND``, whose rows must be contiguous.
        tiles: tile sizes; None takes the default ones.
    """
    base_ND = rows_of(base_ND)
    tokens, width = base_ND.shape
    out_ND = base_ND if in_place else torch.empty_like(base_ND, memory_format=torch.contiguous_format)
    tiles = tiles or add_tiles(h_NR.dtype, tokens)
    _add_product[(triton.cdiv(width, tiles.columns), triton.cdiv(tokens, tiles.rows))](
        h_NR, W_RD, base_ND, out_ND, W_RD.stride(0), base_ND.stride(0), out_ND.stride(0), tokens, width,
        TOTAL=W_RD.shape[0], ROWS=tiles.rows, COLUMNS=tiles.columns, DEPTH=tiles.depth,
        PRECISION=precision(h_NR.dtype), **tiles.launch,
    )  # fmt: skip
    return out_ND


@triton.jit
def _dense_gates(
    sums, row, rank, owner, scale, mask, weights, saved, second, gate_stride, total, experts,
    WIDEST: tl.constexpr, BACKWARD: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Load a tile's gates from [N, E]; keep the products, or store the gradient of the gates."""
    at = row[:, None] * total + rank[None, :]
    gate_at = weights + row[:, None] * gate_stride + owner[None, :]
    gate = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
    if KEEP:
        tl.store(second + at, sums.to(second.dtype.element_ty), mask=mask)
    if BACKWARD:
        products = sums * tl.load(saved + at, mask=mask, other=0.0).to(tl.float32) * scale[None, :]
        sums_of = tl.sum(tl.reshape(products, [ROWS, COLUMNS // WIDEST, WIDEST]), axis=2)
        expert = tl.program_id(0) * (COLUMNS // WIDEST) + tl.arange(0, COLUMNS // WIDEST)
        live = tl.max(mask.to(tl.int32), axis=1) > 0
        inside = live[:, None] & (expert < experts)[None, :]
        tl.store(second + row[:, None] * experts + expert[None, :], sums_of, mask=inside)
    return gate


@triton.jit
def _chosen_gates(
    sums, row, owner, within, scale, mask, ids, weights, saved, second, tokens,
    SLOTS: tl.constexpr, WIDEST: tl.constexpr, BACKWARD: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Load a tile's gates from the chosen experts [N, K]; keep or differentiate at their ranks only."""
    gate = tl.zeros([ROWS, COLUMNS], tl.float32)
    live = row < tokens
    for slot in tl.static_range(SLOTS):
        pair = row * SLOTS + slot
        chosen = tl.load(ids + pair, mask=live, other=-1)
        weight = tl.load(weights + pair, mask=live, other=0.0).to(tl.float32)
        hit = (chosen[:, None] == owner[None, :]) & mask
        gate += tl.where(hit, weight[:, None], 0.0)
        saved_at = pair[:, None] * WIDEST + within[None, :]
        if KEEP:
            tl.store(second + saved_at, sums.to(second.dtype.element_ty), mask=hit)
        if BACKWARD:
            products = sums * tl.load(saved + saved_at, mask=hit, other=0.0).to(tl.float32)
            change = tl.sum(tl.where(hit, products * scale[None, :], 0.0), axis=1)
            tl.store(second + pair, change, mask=tl.max(hit.to(tl.int32), axis=1) > 0)
    return gate


@triton.jit
def _gated(
    x,
    w,
    ids,
    weights,
    saved,
    out,
    second,
    owners,
    starts,
    scaling,
    x_stride,
    w_stride,
    gate_stride,
    tokens,
    total,
    experts,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDEST: tl.constexpr,
    BACKWARD: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    rank = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    step = tl.arange(0, DEPTH)
    live, is_rank = row < tokens, rank < total
    x_at = x + row[:, None] * x_stride + step[None, :]
    w_at = w + rank.to(tl.int64)[None, :] * w_stride + step[:, None]
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for done in range(0, WIDTH, DEPTH):
        x_mask, w_mask = live[:, None], is_rank[None, :]
        if WIDTH % DEPTH != 0:
            x_mask = x_mask & (step < WIDTH - done)[None, :]
            w_mask = w_mask & (step < WIDTH - done)[:, None]
        x_tile = tl.load(x_at + done, mask=x_mask, other=0.0)
        w_tile = tl.load(w_at + done, mask=w_mask, other=0.0)
        sums = product(x_tile, w_tile, sums, PRECISION)
    owner = tl.load(owners + rank, mask=is_rank, other=0)
    scale = tl.load(scaling + owner)
    mask = live[:, None] & is_rank[None, :]
    if SLOTS == 0:
        gate = _dense_gates(
            sums, row, rank, owner, scale, mask, weights, saved, second, gate_stride, total, experts,
            WIDEST, BACKWARD, KEEP, ROWS, COLUMNS,
        )  # fmt: skip
    else:
        within = rank - tl.load(starts + owner)
        gate = _chosen_gates(
            sums, row, owner, within, scale, mask, ids, weights, saved, second, tokens,
            SLOTS, WIDEST, BACKWARD, KEEP, ROWS, COLUMNS,
        )  # fmt: skip
    # A gate of zero must also remove values that are not finite.
    gated = tl.where(gate != 0.0, sums * (gate * scale[None, :]), 0.0)
    tl.store(out + row[:, None] * total + rank[None, :], gated.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add_product(
    h,
    w,
    base,
    out,
    w_stride,
    base_stride,
    out_stride,
    tokens,
    width,
    TOTAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    step = tl.arange(0, DEPTH)
    live, inside = row < tokens, column < width
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for done in range(0, TOTAL, DEPTH):
        h_mask, w_mask = live[:, None], inside[None, :]
        if TOTAL % DEPTH != 0:
            h_mask = h_mask & (step < TOTAL - done)[None, :]
            w_mask = w_mask & (step < TOTAL - done)[:, None]
        h_tile = tl.load(h + row[:, None] * TOTAL + (done + step)[None, :], mask=h_mask, other=0.0)
        w_at = w + (done + step).to(tl.int64)[:, None] * w_stride + column[None, :]
        w_tile = tl.load(w_at, mask=w_mask, other=0.0)
        sums = product(h_tile, w_tile, sums, PRECISION)
    mask = live[:, None] & inside[None, :]
    added = tl.load(base + row[:, None] * base_stride + column[None, :], mask=mask, other=0.0)
    total = (sums + added.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * out_stride + column[None, :], total, mask=mask)
