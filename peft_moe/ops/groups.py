"""Products of tokens that are sorted by expert: three ways, each best somewhere.

- "native": torch's grouped GEMM, which needs one rank for all experts, whole rows of 16 bytes, and no
  float64. On CUDA it is a kernel for bfloat16 from sm_90 on; other cases copy sizes to the host.
- "bins": one batched product, each expert's tokens padded to the fullest one's. For narrow dtypes on a CPU,
  where every product of another size costs tens of microseconds.
- "segments": one expert after another; any ranks, any dtype.

Letters: N tokens, P chosen pairs of token and expert, sorted by expert, I in, X any width, R total rank,
E experts, W ranks of one expert, C tokens of the fullest expert.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from .ranks import RankMap

# Bins waste work where one expert has most tokens; above this ratio of places to tokens they lose.
_MOST_WASTE = 3.0


@dataclass(frozen=True)
class Groups:
    """Pairs in the order of their experts.

    Attributes:
        order: of the pairs, in [N·K], long [P].
        tokens: the row of every pair, long [P].
        ends: where each expert's pairs end, int32 [E] on the device; of "native".
        counts: pairs of each expert; of the others.
        places: of every pair in the bins, long [P].
        ranks: the segments of R.
        way: "native", "bins" or "segments".
    """

    order: Tensor
    tokens: Tensor
    ranks: RankMap
    way: str
    ends: Tensor | None = None
    counts: tuple[int, ...] = ()
    places: Tensor | None = None

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
        h_ECW = torch.bmm(self._binned_rows(x_NX), grid_EXW)
        return h_ECW.view(-1, self.ranks.width).index_select(0, self.places)

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
            y_ECX = torch.bmm(self._binned(h_PW), self._grid(factor_RX))
            y_PX = y_ECX.view(-1, y_ECX.shape[-1]).index_select(0, self.places)
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
        return out_EWX.reshape(self.ranks.total, -1)

    def _each(self) -> list[tuple[slice, slice]]:
        """Pairs and ranks of every expert that has both."""
        ends = [sum(self.counts[:e]) for e in range(len(self.counts) + 1)]
        both = zip(pairwise(ends), self.ranks.slices(), strict=True)
        return [(slice(a, b), s) for (a, b), s in both if b > a and s.stop > s.start]

    def _grid(self, factor_RX: Tensor) -> Tensor:
        return factor_RX.reshape(len(self.ranks.ranks), self.ranks.width, -1)

    def _binned(self, h_PW: Tensor) -> Tensor:
        experts = len(self.ranks.ranks)
        bins = h_PW.new_zeros(experts * _fullest(self.counts), h_PW.shape[1])
        assert self.places is not None
        return bins.index_copy_(0, self.places, h_PW).view(experts, -1, h_PW.shape[1])

    def _binned_rows(self, x_NX: Tensor) -> Tensor:
        # Places that nobody takes read row 0; nobody reads what comes of it.
        assert self.places is not None
        experts = len(self.ranks.ranks)
        rows = self.tokens.new_zeros(experts * _fullest(self.counts)).index_copy_(0, self.places, self.tokens)
        return x_NX.index_select(0, rows).view(experts, -1, x_NX.shape[1])


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
    narrow = dtype.itemsize < 4 and ranks.equal
    full = experts * _fullest(counts) <= _MOST_WASTE * max(pairs, 8 * experts)
    return regroup(order, ids_NK, ranks, "bins" if narrow and full else "segments", None, counts)


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
    if way != "bins":
        return groups
    fullest, starts = _fullest(counts), [sum(counts[:e]) for e in range(len(counts))]
    firsts_E = torch.tensor([e * fullest - start for e, start in enumerate(starts)], device=order.device)
    experts_P = ids_NK.flatten().index_select(0, order)
    places = torch.arange(len(order), device=order.device) + firsts_E.index_select(0, experts_P)
    return replace(groups, places=places)


def _fullest(counts: tuple[int, ...]) -> int:
    """C, in steps of 8: fewer sizes of products, which are prepared once each."""
    return -(-max(1, *counts) // 8) * 8 if counts else 8
