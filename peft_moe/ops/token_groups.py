"""Products of tokens that are sorted by expert, in four layouts.

A pair is a token with one of its K chosen experts. ``group`` sorts the N · K pairs by expert, so that the
pairs of an expert lie in one piece and its product is one matrix product. Each layout is the fastest one
somewhere:

- "native": torch's grouped GEMM. It needs equal ranks, rows in multiples of 16 bytes, and no float64. On
  CUDA it has a kernel for bfloat16 on sm_90 and sm_100; other cases copy the sizes to the host.
- "bins": one batched product over experts; each expert's pairs are padded to the number of the fullest one.
  It serves narrow dtypes on a CPU, where each product of another size costs tens of microseconds.
- "tiles": one batched product over blocks of C pairs. An expert gets as many blocks as it fills, each with a
  copy of its factors. However uneven the choices are, at least about half of the slots hold a pair.
- "segments": a loop over experts; any ranks, any dtype.

Letters: N tokens, P chosen pairs, sorted by expert, I in, X any width, R total rank, E experts, W ranks of
one expert, G bins or tiles, C slots of one bin or tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn import functional

from .rank_map import RankMap


@dataclass(frozen=True)
class Groups:
    """Pairs of tokens and experts, sorted by expert.

    Attributes:
        order: index of each sorted pair in the flattened [N · K] ids, long [P].
        tokens: token of each pair, long [P].
        ranks: the segments of R.
        layout: "native", "bins", "tiles" or "segments".
        ends: for "native", the end of each expert's pairs, int32 [E] on the device.
        counts: for the other layouts, the number of pairs of each expert.
        slots: for bins and tiles, the slot of each pair in the flattened [G · C], long [P].
        shape: for bins and tiles, G and C.
        owners: for tiles, the expert of each tile, long [G].
    """

    order: Tensor
    tokens: Tensor
    ranks: RankMap
    layout: str
    ends: Tensor | None = None
    counts: tuple[int, ...] = ()
    slots: Tensor | None = None
    shape: tuple[int, int] = (0, 0)
    owners: Tensor | None = None

    def up(self, x_NX: Tensor, factor_RX: Tensor) -> Tensor:
        """Multiply each pair's row by its expert's factor, [N, X] to [P, W]; zeros beyond its rank."""
        if self.layout == "segments":
            h_PW = x_NX.new_zeros(len(self.tokens), self.ranks.width)
            for rows, segment in self._each():
                part_NX = x_NX.index_select(0, self.tokens[rows])
                h_PW[rows, : segment.stop - segment.start] = functional.linear(part_NX, factor_RX[segment])
            return h_PW
        grid_EXW = self._grid(factor_RX).transpose(1, 2)
        if self.slots is None:
            return functional.grouped_mm(x_NX.index_select(0, self.tokens), grid_EXW, offs=self.ends)
        h_GCW = torch.bmm(self._binned_rows(x_NX), grid_EXW)
        return h_GCW.view(-1, self.ranks.width).index_select(0, self.slots)

    def down(self, h_PW: Tensor, factor_RX: Tensor, out_NX: Tensor) -> Tensor:
        """Multiply each pair's ranks by its expert's factor and add them to ``out_NX``, in place."""
        if self.layout == "segments":
            for rows, segment in self._each():
                y_PX = h_PW[rows, : segment.stop - segment.start] @ factor_RX[segment]
                out_NX.index_add_(0, self.tokens[rows], y_PX.to(out_NX.dtype))
            return out_NX
        if self.slots is None:
            y_PX = functional.grouped_mm(h_PW.contiguous(), self._grid(factor_RX), offs=self.ends)
        else:
            y_GCX = torch.bmm(self._binned(h_PW), self._grid(factor_RX))
            y_PX = y_GCX.view(-1, y_GCX.shape[-1]).index_select(0, self.slots)
        return out_NX.index_add_(0, self.tokens, y_PX.to(out_NX.dtype))

    def outer(self, h_PW: Tensor, x_NX: Tensor) -> Tensor:
        """Sum ranks times rows over each expert's pairs: the gradient of a factor, [R, X]."""
        if self.layout == "segments":
            out_RX = x_NX.new_zeros(self.ranks.total, x_NX.shape[1])
            for rows, segment in self._each():
                part_NX = x_NX.index_select(0, self.tokens[rows])
                out_RX[segment] = h_PW[rows, : segment.stop - segment.start].T @ part_NX
            return out_RX
        if self.slots is None:
            rows_PX = x_NX.index_select(0, self.tokens)
            out_EWX = functional.grouped_mm(h_PW.contiguous().T, rows_PX, offs=self.ends)
        else:
            out_EWX = torch.bmm(self._binned(h_PW).transpose(1, 2), self._binned_rows(x_NX))
            if self.owners is not None:
                of_tiles_GWX, experts = out_EWX, len(self.ranks.ranks)
                out_EWX = of_tiles_GWX.new_zeros(experts, *of_tiles_GWX.shape[1:])
                out_EWX.index_add_(0, self.owners, of_tiles_GWX)
        return out_EWX.reshape(self.ranks.total, -1)

    def _each(self) -> list[tuple[slice, slice]]:
        """Return the pairs and the ranks of each expert that has both."""
        ends = [sum(self.counts[:e]) for e in range(len(self.counts) + 1)]
        both = zip(pairwise(ends), self.ranks.slices(), strict=True)
        return [(slice(a, b), s) for (a, b), s in both if b > a and s.stop > s.start]

    def _grid(self, factor_RX: Tensor) -> Tensor:
        """Return a factor per expert, [E, W, X], or per tile, [G, W, X]."""
        grid_EWX = factor_RX.reshape(len(self.ranks.ranks), self.ranks.width, -1)
        return grid_EWX if self.owners is None else grid_EWX.index_select(0, self.owners)

    def _binned(self, h_PW: Tensor) -> Tensor:
        assert self.slots is not None
        bins = h_PW.new_zeros(self.shape[0] * self.shape[1], h_PW.shape[1])
        return bins.index_copy_(0, self.slots, h_PW).view(*self.shape, -1)

    def _binned_rows(self, x_NX: Tensor) -> Tensor:
        # Empty slots read row 0; their products are never read.
        assert self.slots is not None
        rows = self.tokens.new_zeros(self.shape[0] * self.shape[1])
        return x_NX.index_select(0, rows.index_copy_(0, self.slots, self.tokens)).view(*self.shape, -1)


def group(ids_NK: Tensor, ranks: RankMap, native: bool, dtype: torch.dtype) -> Groups:
    """Sort pairs by expert and choose a layout.

    Pairs of "no expert" (the number E) are left out. In the native layout they are part of the last expert's
    group and the caller sets their gates to zero, because to leave them out the host would need their number.

    Args:
        ids_NK: chosen experts, [N, K].
        ranks: the segments of R.
        native: whether torch's grouped GEMM can serve; then nothing is read back from the device.
        dtype: dtype of the products.
    """
    experts, chosen = len(ranks.ranks), ids_NK.shape[1]
    if native:
        # "No expert" joins the last expert: a group of its own would need factors of its own.
        sorted_P, order = ids_NK.clamp_max(experts - 1).flatten().sort(stable=True)
        ends = torch.searchsorted(sorted_P, ranks.numbers(ids_NK.device), right=True, out_int32=True)
        return Groups(order, order // chosen, ranks, "native", ends=ends)
    sorted_P, order = ids_NK.flatten().sort(stable=True)
    ends_E = torch.searchsorted(sorted_P, ranks.numbers(ids_NK.device), right=True).tolist()
    counts = tuple(end - start for start, end in pairwise([0, *ends_E]))
    pairs = ends_E[-1]
    order = order[:pairs]
    if dtype.itemsize >= 4 or not ranks.equal:
        return regroup(order, ids_NK, ranks, "segments", None, counts)
    # Bins waste slots where choices are uneven; a tile also costs the copy of its expert's W ranks. Both are
    # compared by the rows that go through memory.
    bin_rows, (tiles, size) = experts * _bin_size(counts), _tiling(counts)
    layout = "bins" if bin_rows <= tiles * (size + ranks.width) else "tiles"
    return regroup(order, ids_NK, ranks, layout, None, counts)


def regroup(
    order: Tensor,
    ids_NK: Tensor,
    ranks: RankMap,
    layout: str,
    ends: Tensor | None,
    counts: tuple[int, ...],
) -> Groups:
    """Build the groups from an order that is already sorted.

    A forward pass saves the order, the layout and the counts; its backward pass calls this and needs neither
    a second sort nor a second read from the device.
    """
    groups = Groups(order, order // ids_NK.shape[1], ranks, layout, ends=ends, counts=counts)
    if layout not in ("bins", "tiles"):
        return groups
    owners: Tensor | None = None
    if layout == "bins":
        shape = len(counts), _bin_size(counts)
        first_slots = [e * shape[1] for e in range(len(counts))]
    else:
        shape = _tiling(counts)
        tiles_E = [-(-count // shape[1]) for count in counts]
        first_slots = [
            shape[1] * (end - tiles) for end, tiles in zip(accumulate(tiles_E), tiles_E, strict=True)
        ]
        tile_experts = [e for e, tiles in enumerate(tiles_E) for _ in range(tiles)]
        owners = torch.tensor(tile_experts + [0] * (shape[0] - len(tile_experts)), device=order.device)
    # Pair p of an expert whose pairs start at s gets slot first_slot + (p - s): a shift of p per expert.
    shifts = [
        first - (end - count)
        for first, end, count in zip(first_slots, accumulate(counts), counts, strict=True)
    ]
    experts_P = ids_NK.flatten().index_select(0, order)
    shifts_P = torch.tensor(shifts, device=order.device).index_select(0, experts_P)
    slots = torch.arange(len(order), device=order.device) + shifts_P
    return replace(groups, slots=slots, shape=shape, owners=owners)


def _bin_size(counts: tuple[int, ...]) -> int:
    """Return C of bins, a multiple of 8: each new size of a product costs a CPU time to prepare."""
    return -(-max(1, *counts) // 8) * 8 if counts else 8


def _tiling(counts: tuple[int, ...]) -> tuple[int, int]:
    """Return G and C of tiles: C near an expert's average number of pairs, G rounded up for fewer sizes."""
    size = max(8, sum(counts) // len(counts) // 8 * 8)
    step = max(8, len(counts) // 4)
    tiles = sum(-(-count // size) for count in counts)
    return -(-tiles // step) * step, size
