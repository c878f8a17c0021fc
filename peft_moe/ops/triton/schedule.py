"""Tokens sorted by expert, on the device and without asking the host: counts, then places.

The grid is sized for the worst case, so that nothing has to be read back: a slot's N tokens fill at most
⌊N / rows⌋ + E + 1 blocks of one expert each, and programs beyond the last used block return at once.
Each of a token's K slots is sorted by itself: within a slot no token comes twice, so that a kernel may
add to the token's row without atomics, in an order that never changes.

Letters: N tokens, K slots of a token, E experts (group E: none).
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a program's one-hot tile, which bounds how many tokens it counts.
_ONE_HOT, _MAX_CHUNK = 8192, 128


@dataclass(frozen=True)
class Schedule:
    """Where each block of sorted tokens finds its expert and its tokens.

    Attributes:
        groups: expert of every block, int32 [K, M]; E for tokens without one, above E for an unused block.
        order: the blocks' tokens, int32 [K, M, rows]; -1 where a block is not full.
        rows: tokens per block.
    """

    groups: Tensor
    order: Tensor
    rows: int

    @property
    def blocks(self) -> int:
        """M, how many blocks a slot has room for."""
        return self.groups.shape[1]


def make_schedule(expert_ids_NK: Tensor, experts: int, rows: int) -> Schedule:
    """Sort every slot's tokens by expert; stable, in two launches.

    Args:
        expert_ids_NK: [N, K], any integer dtype, N ≥ 1; an id outside [0, E) means no expert.
        experts: E.
        rows: tokens per block.
    """
    expert_ids_NK = expert_ids_NK.contiguous()
    tokens, slots = expert_ids_NK.shape
    wide = triton.next_power_of_2(experts + 1)
    chunk = max(16, min(_MAX_CHUNK, _ONE_HOT // wide))
    chunks = triton.cdiv(tokens, chunk)
    blocks = min(tokens, tokens // rows + experts + 1)
    counts = expert_ids_NK.new_empty(slots, chunks, wide, dtype=torch.int32)
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
        WIDE=wide,
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
        WIDE=wide,
        ROWS=rows,
        SHARE=triton.next_power_of_2(triton.cdiv(blocks, chunks)),
        STEP=max(1, min(32, _ONE_HOT // wide)),
    )
    return schedule


@triton.jit
def _one_hot(ids, tokens, slots, experts, CHUNK: tl.constexpr, WIDE: tl.constexpr):
    """Tokens of this program's chunk, which of them exist, and int32 [CHUNK, WIDE] of their groups."""
    token = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    live = token < tokens
    group = tl.load(ids + token * slots + tl.program_id(1), mask=live, other=0).to(tl.int32)
    group = tl.where((group < 0) | (group >= experts), experts, group)
    hot = (group[:, None] == tl.arange(0, WIDE)[None, :]) & live[:, None]
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
    WIDE: tl.constexpr,
):
    chunk, slot = tl.program_id(0), tl.program_id(1)
    _, _, hot = _one_hot(ids, tokens, slots, experts, CHUNK, WIDE)
    row = slot * tl.num_programs(0) + chunk
    tl.store(counts + row * WIDE + tl.arange(0, WIDE), tl.sum(hot, axis=0))
    # Every program also marks its share of the places as empty.
    end = tl.minimum((chunk + 1) * share, width)
    start = chunk * share
    while start < end:
        place = start + tl.arange(0, 256)
        tl.store(order + slot * width + place, tl.full([256], -1, tl.int32), mask=place < end)
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
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    SHARE: tl.constexpr,
    STEP: tl.constexpr,
):
    chunk, slot = tl.program_id(0), tl.program_id(1)
    chunks = tl.num_programs(0)
    token, live, hot = _one_hot(ids, tokens, slots, experts, CHUNK, WIDE)
    column = tl.arange(0, WIDE)
    total = tl.zeros([WIDE], tl.int32)
    before = tl.zeros([WIDE], tl.int32)
    start = 0
    while start < chunks:
        row = start + tl.arange(0, STEP)
        place = (slot * chunks + row)[:, None] * WIDE + column[None, :]
        part = tl.load(counts + place, mask=(row < chunks)[:, None], other=0)
        total += tl.sum(part, axis=0)
        before += tl.sum(tl.where((row < chunk)[:, None], part, 0), axis=0)
        start += STEP
    used = (total + ROWS - 1) // ROWS
    ends = tl.cumsum(used, axis=0)
    first = (ends - used) * ROWS + before
    rank = tl.cumsum(hot, axis=0) - 1
    place = tl.sum(tl.where(hot > 0, first[None, :] + rank, 0), axis=1)
    tl.store(order + slot * width + place, token, mask=live)
    # Every program also names the experts of its share of the blocks.
    block = chunk * share + tl.arange(0, SHARE)
    group = tl.sum((ends[None, :] <= block[:, None]).to(tl.int32), axis=1)
    mine = (tl.arange(0, SHARE) < share) & (block < blocks)
    tl.store(groups + slot * blocks + block, group, mask=mine)
