"""Selection of the chosen experts' ranks from the rank axis, and the way back onto it.

A top-k router gives each token K expert numbers. ``ChosenRanks`` turns them into indices of ranks once;
``take`` then gathers [N, R] to [N, K, W], and ``put`` scatters [N, K, W] to [N, R].

Letters: N tokens, R total rank, E experts, K chosen experts, W ranks of one expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rank_map import RankMap


class ChosenRanks:
    """The ranks that belong to each token's chosen experts.

    There are two layouts. With equal ranks, the rank axis is a grid [E, W], and an index names one row of W
    numbers: rows move several times faster than single elements. With unequal ranks, an index names one rank,
    and experts with fewer than W ranks are padded with the index R.

    "No expert" (the number E) and the padding have no ranks, but an index must point somewhere. ``put``
    writes them behind the last rank and cuts that part off. ``take`` reads some existing rank for them, whose
    values ``put`` and ``sums`` ignore.

    Args:
        ids_NK: chosen experts, distinct; E is "no expert".
        ranks: the segments of R.
        may_select_null: whether "no expert" may be among them.
    """

    def __init__(self, ids_NK: Tensor, ranks: RankMap, may_select_null: bool) -> None:
        self.ids_NK, self.ranks, self.may_select_null = ids_NK, ranks, may_select_null
        experts = len(ranks.ranks)
        # Rows per token of the grid that `put` writes: one more where "no expert" needs a row.
        self._put_rows = experts + may_select_null
        if ranks.equal:
            self._put_index = _grid_rows(ids_NK, self._put_rows)
            self._take_index = (
                _grid_rows(ids_NK.clamp_max(experts - 1), experts) if may_select_null else self._put_index
            )
        else:
            self._put_index = ranks.rows(ids_NK.device)[ids_NK]
            self._take_index = self._put_index.clamp_max(ranks.total - 1)

    def take(self, values_NR: Tensor) -> Tensor:
        """Gather the ranks of the chosen experts, [N, R] to [N, K, W].

        Entries without a rank ("no expert", padding) hold arbitrary values.
        """
        if self.ranks.equal:
            rows = values_NR.view(-1, self.ranks.width).index_select(0, self._take_index)
            return rows.view(*self.ids_NK.shape, self.ranks.width)
        return values_NR.gather(1, self._take_index.flatten(1)).view(self._take_index.shape)

    def put(self, values_NKW: Tensor, buffer_NR: Tensor | None = None) -> Tensor:
        """Scatter values back onto the rank axis, [N, R], with zeros at all other experts.

        Args:
            values_NKW: in the layout of :meth:`take`.
            buffer_NR: memory that may be overwritten for the result; None allocates.
        """
        tokens, total = len(self.ids_NK), self.ranks.total
        if self.ranks.equal:
            if buffer_NR is None or self.may_select_null:
                buffer_NR = values_NKW.new_zeros(tokens, self._put_rows * self.ranks.width)
            else:
                buffer_NR.zero_()
            rows = buffer_NR.view(-1, self.ranks.width)
            rows.index_copy_(0, self._put_index, values_NKW.reshape(-1, self.ranks.width))
            return buffer_NR[:, :total] if self.may_select_null else buffer_NR
        buffer_NR = values_NKW.new_zeros(tokens, total + 1)
        return buffer_NR.scatter(1, self._put_index.flatten(1), values_NKW.flatten(1))[:, :total]

    def weigh(self, values_NKW: Tensor, weights_NK: Tensor) -> Tensor:
        """Multiply every rank by its expert's weight and scaling."""
        scaled_NK = self.ranks.scale_chosen(weights_NK, self.ids_NK).to(values_NKW.dtype)
        # On a CPU, a product of equal shapes is several times faster than one that broadcasts.
        return values_NKW * scaled_NK[..., None].expand_as(values_NKW).contiguous()

    def sums(self, values_NKW: Tensor) -> Tensor:
        """Sum over the ranks of each chosen expert and scale, [N, K]; 0 for "no expert"."""
        if self.ranks.equal:
            sums_NK = values_NKW.sum(-1)
            if self.may_select_null:
                sums_NK = sums_NK.masked_fill(self.ids_NK == len(self.ranks.ranks), 0.0)
        else:
            sums_NK = values_NKW.masked_fill(self._put_index == self.ranks.total, 0.0).sum(-1)
        return self.ranks.scale_chosen(sums_NK, self.ids_NK)


def _grid_rows(ids_NK: Tensor, rows_per_token: int) -> Tensor:
    """Return the row of each chosen expert in the grids of all tokens, one grid after another, [N · K]."""
    starts_N = torch.arange(0, len(ids_NK) * rows_per_token, rows_per_token, device=ids_NK.device)
    return (ids_NK + starts_N[:, None]).flatten()
