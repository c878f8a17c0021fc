"""Products of tokens that are sorted by expert: four ways, each best somewhere.

- "native": torch's grouped GEMM, which needs one rank for all experts, whole rows of 16 bytes, and no
  float64. On CUDA it is a kernel for bfloat16 from sm_90 on; other cases copy sizes to the host.
- "bins": one batched product, each expert's tokens padded to the fullest one's. For narrow dtypes on a CPU,
  where every product of another size costs tens of microseconds.
- "tiles": the same in blocks of some tokens, as many for each expert as it fills, with a copy of its factors
  for each. However uneven the choices are, about half of the places hold a token at least.
- "segments": one expert after another; any ranks, any dtype.

Letters: N tokens, P chosen pairs of token and expert, sorted by expert, I in, X any width, R total rank,
E experts, W ranks of one expert, G bins or tiles, C places of one.
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
    """Pairs in the order of their experts.

    Attributes:
        order: of the pairs, in [N·K], long [P].
        tokens: the row of every pair, long [P].
        ends: where each expert's pairs end, int32 [E] on the device; of "native".
        counts: pairs of each expert; of the others.
        places: of every pair in the bins or tiles, long [P].
        shape: G and C.
        owners: the expert of every tile, long [G].
        ranks: the segments of R.
        way: "native", "bins", "tiles" or "segments".
    """

    order: Tensor
    tokens: Tensor
    ranks: RankMap
    way: str
    ends: Tensor | None = None
    counts: tuple[int, ...] = ()
    places: Tensor | None = None
    shape: tuple[int, int] = (0, 0)
    owners: Tensor | None = None

    def up(self, x_NX: Tensor, factor_RX: Tensor) -> Tensor:
        """Each pair's row times its expert's slab, [N, X] to [P, W]; zero where it has no such rank."""
        if self.way == "segments":
            h_PW = x_NX.new_zeros(len(self.tokens), self.ranks.width)
            for rows, segment in self._each():
                part_NX = x_NX.index_select(0, self.tokens[rows])
                h_PW[rows, : segment.stop - segment.start] = functional.linear(part_NX, factor_RX[segment])
            return h_PW
        grid_EXW = self._grid(factor_RX).transpose(1, 2)
        if self.places is None:
            return functional.grouped_mm(x_NX.index_select(0, self.tokens), grid_EXW, offs=self.ends)
        h_GCW = torch.bmm(self._binned_rows(x_NX), grid_EXW)
        return h_GCW.view(-1, self.ranks.width).index_select(0, self.places)

    def down(self, h_PW: Tensor, factor_RX: Tensor, out_NX: Tensor) -> Tensor:
        """Each pair's ranks times its expert's slab, added to its token's row of ``out_NX``, in place."""
        if self.way == "segments":
            for rows, segment in self._each():
                y_PX = h_PW[rows, : segment.stop - segment.start] @ factor_RX[segment]
                out_NX.index_add_(0, self.tokens[rows], y_PX.to(out_NX.dtype))
            return out_NX
        if self.places is None:
            y_PX = functional.grouped_mm(h_PW.contiguous(), self._grid(factor_RX), offs=self.ends)
        else:
            y_GCX = torch.bmm(self._binned(h_PW), self._grid(factor_RX))
            y_PX = y_GCX.view(-1, y_GCX.shape[-1]).index_select(0, self.places)
        return out_NX.index_add_(0, self.tokens, y_PX.to(out_NX.dtype))

    def outer(self, h_PW: Tensor, x_NX: Tensor) -> Tensor:
        """Sums over each expert's pairs of ranks times rows: a gradient [R, X]."""
        if self.way == "segments":
            out_RX = x_NX.new_zeros(self.ranks.total, x_NX.shape[1])
            for rows, segment in self._each():
                part_NX = x_NX.index_select(0, self.tokens[rows])
                out_RX[segment] = h_PW[rows, : segment.stop - segment.start].T @ part_NX
            return out_RX
        if self.places is None:
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
        """Pairs and ranks of every expert that has both."""
        ends = [sum(self.counts[:e]) for e in range(len(self.counts) + 1)]
        both = zip(pairwise(ends), self.ranks.slices(), strict=True)
        return [(slice(a, b), s) for (a, b), s in both if b > a and s.stop > s.start]

    def _grid(self, factor_RX: Tensor) -> Tensor:
        """A factor by experts, [E, W, X], or by tiles, [G, W, X]."""
        grid_EWX = factor_RX.reshape(len(self.ranks.ranks), self.ranks.width, -1)
        return grid_EWX if self.owners is None else grid_EWX.index_select(0, self.owners)

    def _binned(self, h_PW: Tensor) -> Tensor:
        assert self.places is not None
        bins = h_PW.new_zeros(self.shape[0] * self.shape[1], h_PW.shape[1])
        return bins.index_copy_(0, self.places, h_PW).view(*self.shape, -1)

    def _binned_rows(self, x_NX: Tensor) -> Tensor:
        # Places that nobody takes read row 0; nobody reads what comes of it.
        assert self.places is not None
        rows = self.tokens.new_zeros(self.shape[0] * self.shape[1])
        return x_NX.index_select(0, rows.index_copy_(0, self.places, self.tokens)).view(*self.shape, -1)


def group(ids_NK: Tensor, ranks: RankMap, native: bool, dtype: torch.dtype) -> Groups:
    """Sort pairs by expert; those of "no expert" (the number E) are left out, or weigh nothing.

    Args:
        ids_NK: chosen experts, [N, K].
        ranks: the segments of R.
        native: whether torch's grouped GEMM can serve; nothing is read back from the device then.
        dtype: of the products.
    """
    experts, chosen = len(ranks.ranks), ids_NK.shape[1]
    if native:
        # Their weights are 0; a group of their own would need weights of its own.
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
    places, (tiles, size) = experts * _fullest(counts), _tiling(counts)
    # A tile also costs the copy of its expert's ranks.
    way = "bins" if places <= tiles * (size + ranks.width) else "tiles"
    return regroup(order, ids_NK, ranks, way, None, counts)


def regroup(
    order: Tensor,
    ids_NK: Tensor,
    ranks: RankMap,
    way: str,
    ends: Tensor | None,
    counts: tuple[int, ...],
) -> Groups:
    """The groups of a known order: what a backward pass starts from."""
    groups = Groups(order, order // ids_NK.shape[1], ranks, way, ends=ends, counts=counts)
    if way not in ("bins", "tiles"):
        return groups
    owners: Tensor | None = None
    if way == "bins":
        shape = len(counts), _fullest(counts)
        firsts = [e * shape[1] for e in range(len(counts))]
    else:
        shape = _tiling(counts)
        filled = [-(-count // shape[1]) for count in counts]
        firsts = [shape[1] * (end - own) for end, own in zip(accumulate(filled), filled, strict=True)]
        numbers = [e for e, own in enumerate(filled) for _ in range(own)]
        owners = torch.tensor(numbers + [0] * (shape[0] - len(numbers)), device=order.device)
    shifts = [
        first - end + count for first, end, count in zip(firsts, accumulate(counts), counts, strict=True)
    ]
    experts_P = ids_NK.flatten().index_select(0, order)
    shifts_P = torch.tensor(shifts, device=order.device).index_select(0, experts_P)
    places = torch.arange(len(order), device=order.device) + shifts_P
    return replace(groups, places=places, shape=shape, owners=owners)


def _fullest(counts: tuple[int, ...]) -> int:
    """C of bins, in steps of 8: fewer sizes of products, which are prepared once each."""
    return -(-max(1, *counts) // 8) * 8 if counts else 8


def _tiling(counts: tuple[int, ...]) -> tuple[int, int]:
    """G and C of tiles: C about what an expert gets on average; G in steps, for fewer sizes of products."""
    size = max(8, sum(counts) // len(counts) // 8 * 8)
    step = max(8, len(counts) // 4)
    tiles = sum(-(-count // size) for count in counts)
    return -(-tiles // step) * step, size
