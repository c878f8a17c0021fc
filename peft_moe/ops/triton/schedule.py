"""A counting sort of tokens by expert, on the device and without a wait for the host.

The first kernel counts the tokens of each expert in each chunk; the second one computes from the counts where
each token goes. The grid is sized for the worst case, so that nothing has to be read back: a slot's N tokens
fill at most ⌊N / rows⌋ + E + 1 blocks of one expert each, and programs beyond the last used block return at
once. Each of a token's K slots is sorted separately. A slot holds each token once, so that a kernel adds to
the token's row without atomics, in an order that never changes.

Letters: N tokens, K slots of a token, E experts (group E: none).
"""

# Triton's decorators are untyped, and a kernel's arguments are pointers without a Python type.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# The most elements of a program's one-hot tile; they bound the number of tokens that it counts.
_ONE_HOT, _MAX_CHUNK = 8192, 128


@dataclass(frozen=True)
class Schedule:
    """The expert and the tokens of each block of sorted tokens.

    Attributes:
        groups: expert of each block, int32 [K, M]; E for tokens without one, above E for an unused block.
        order: tokens of each block, int32 [K, M, rows]; -1 where a block is not full.
        rows: tokens per block.
    """

    groups: Tensor
    order: Tensor
    rows: int

    @property
    def blocks(self) -> int:
        """Return M, the number of blocks that a slot has room for."""
        return self.groups.shape[1]


def make_schedule(expert_ids_NK: Tensor, experts: int, rows: int) -> Schedule:
    """Sort each slot's tokens by expert; the sort is stable and takes two launches.

    Args:
        expert_ids_NK: [N, K] in any integer dtype, N ≥ 1; an id outside [0, E) means no expert.
        experts: E.
        rows: tokens per block.
    """
    expert_ids_NK = expert_ids_NK.contiguous()
    tokens, slots = expert_ids_NK.shape
    columns = triton.next_power_of_2(experts + 1)
    chunk = max(16, min(_MAX_CHUNK, _ONE_HOT // columns))
    chunks = triton.cdiv(tokens, chunk)
    blocks = min(tokens, tokens // rows + experts + 1)
    counts = expert_ids_NK.new_empty(slots, chunks, columns, dtype=torch.int32)
    schedule = Schedule(
        groups=expert_ids_NK.new_empty(slots, blocks, dtype=torch.int32),
        order=expert_ids_NK.new_empty(slots, blocks, rows, dtype=torch.int32),
        rows=rows,
    )
    grid, width = (chunks, slots), blocks * rows
    _count[grid](
        expert_ids_NK,
        counts,
        schedule.order,
        tokens,
        slots,
        experts,
        width,
        triton.cdiv(width, chunks),
        CHUNK=chunk,
        COLUMNS=columns,
    )
    _place[grid](
        expert_ids_NK,
        counts,
        schedule.order,
        schedule.groups,
        tokens,
        slots,
        experts,
        width,
        blocks,
        triton.cdiv(blocks, chunks),
        CHUNK=chunk,
        COLUMNS=columns,
        ROWS=rows,
        SHARE=triton.next_power_of_2(triton.cdiv(blocks, chunks)),
        STEP=max(1, min(32, _ONE_HOT // columns)),
    )
    return schedule


@triton.jit
def _one_hot(ids, tokens, slots, experts, CHUNK: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the tokens of this program's chunk, a mask of those that exist, and their groups one-hot."""
    token = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    live = token < tokens
    group = tl.load(ids + token * slots + tl.program_id(1), mask=live, other=0).to(tl.int32)
    group = tl.where((group < 0) | (group >= experts), experts, group)
    hot = (group[:, None] == tl.arange(0, COLUMNS)[None, :]) & live[:, None]
    return token, live, hot.to(tl.int32)


@triton.jit
def _count(
    ids,
    counts,
    order,
    tokens,
    slots,
    experts,
    width,
    share,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    chunk, slot = tl.program_id(0), tl.program_id(1)
    _, _, hot = _one_hot(ids, tokens, slots, experts, CHUNK, COLUMNS)
    row = slot * tl.num_programs(0) + chunk
    tl.store(counts + row * COLUMNS + tl.arange(0, COLUMNS), tl.sum(hot, axis=0))
    # Each program also marks its share of the order as empty.
    end = tl.minimum((chunk + 1) * share, width)
    start = chunk * share
    while start < end:
        position = start + tl.arange(0, 256)
        tl.store(order + slot * width + position, tl.full([256], -1, tl.int32), mask=position < end)
        start += 256


@triton.jit
def _place(
    ids,
    counts,
    order,
    groups,
    tokens,
    slots,
    experts,
    width,
    blocks,
    share,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    SHARE: tl.constexpr,
    STEP: tl.constexpr,
):
    chunk, slot = tl.program_id(0), tl.program_id(1)
    chunks = tl.num_programs(0)
    token, live, hot = _one_hot(ids, tokens, slots, experts, CHUNK, COLUMNS)
    column = tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.int32)
    before = tl.zeros([COLUMNS], tl.int32)
    start = 0
    while start < chunks:
        row = start + tl.arange(0, STEP)
        position = (slot * chunks + row)[:, None] * COLUMNS + column[None, :]
        chunk_counts = tl.load(counts + position, mask=(row < chunks)[:, None], other=0)
        total += tl.sum(chunk_counts, axis=0)
        before += tl.sum(tl.where((row < chunk)[:, None], chunk_counts, 0), axis=0)
        start += STEP
    # A token's position is the start of its expert's blocks, plus the expert's tokens in earlier chunks, plus
    # those before it in this chunk.
    used = (total + ROWS - 1) // ROWS
    ends = tl.cumsum(used, axis=0)
    first = (ends - used) * ROWS + before
    rank = tl.cumsum(hot, axis=0) - 1
    position = tl.sum(tl.where(hot > 0, first[None, :] + rank, 0), axis=1)
    tl.store(order + slot * width + position, token, mask=live)
    # Each program also writes the experts of its share of the blocks.
    block = chunk * share + tl.arange(0, SHARE)
    group = tl.sum((ends[None, :] <= block[:, None]).to(tl.int32), axis=1)
    mine = (tl.arange(0, SHARE) < share) & (block < blocks)
    tl.store(groups + slot * blocks + block, group, mask=mine)
