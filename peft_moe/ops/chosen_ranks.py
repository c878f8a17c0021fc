"""Ranks of the chosen experts, taken off the rank axis and put back on it.

Letters: N tokens, R total rank, E experts, K chosen experts, W ranks of one expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rank_map import RankMap


class Chosen:
    """Which ranks each token's experts have.

    Args:
        ids_NK: chosen experts, distinct; E is "no expert".
        ranks: the segments of R.
        may_select_null: whether "no expert" may be among them.
    """

    def __init__(self, ids_NK: Tensor, ranks: RankMap, may_select_null: bool) -> None:
        self.ids_NK, self.ranks, self.may_select_null = ids_NK, ranks, may_select_null
        experts = len(ranks.ranks)
        # Behind the last rank there is room for what belongs to no expert, and is cut off.
        self._places = experts + may_select_null
        if ranks.equal:
            # Whole rows move several times faster than elements. What "no expert" takes is not looked at.
            self._to = _grid_rows(ids_NK, self._places)
            self._from = _grid_rows(ids_NK.clamp_max(experts - 1), experts) if may_select_null else self._to
        else:
            self._to = ranks.rows(ids_NK.device)[ids_NK]
            self._from = self._to.clamp_max(ranks.total - 1)

    def take(self, values_NR: Tensor) -> Tensor:
        """Ranks of the chosen, [N, R] to [N, K, W]; anything where an expert has no such rank."""
        if self.ranks.equal:
            rows = values_NR.view(-1, self.ranks.width).index_select(0, self._from)
            return rows.view(*self.ids_NK.shape, self.ranks.width)
        return values_NR.gather(1, self._from.flatten(1)).view(self._from.shape)

    def put(self, values_NKW: Tensor, room_NR: Tensor | None = None) -> Tensor:
        """Back on the rank axis, [N, R], with zeros at all other experts.

        Args:
            values_NKW: as :meth:`take` gives them.
            room_NR: what may be overwritten for it.
        """
        tokens, total = len(self.ids_NK), self.ranks.total
        if self.ranks.equal:
            if room_NR is None or self.may_select_null:
                room_NR = values_NKW.new_zeros(tokens, self._places * self.ranks.width)
            else:
                room_NR.zero_()
            by_expert = room_NR.view(-1, self.ranks.width)
            by_expert.index_copy_(0, self._to, values_NKW.reshape(-1, self.ranks.width))
            return room_NR[:, :total] if self.may_select_null else room_NR
        room_NR = values_NKW.new_zeros(tokens, total + 1)
        return room_NR.scatter(1, self._to.flatten(1), values_NKW.flatten(1))[:, :total]

    def weigh(self, values_NKW: Tensor, weights_NK: Tensor) -> Tensor:
        """Every rank times its expert's weight and scaling."""
        scaled_NK = self.ranks.scale_chosen(weights_NK, self.ids_NK).to(values_NKW.dtype)
        # On CPU a product of equal shapes is several times faster than one that repeats a narrow operand.
        return values_NKW * scaled_NK[..., None].expand_as(values_NKW).contiguous()

    def sums(self, values_NKW: Tensor) -> Tensor:
        """Scaled sums over the ranks of each chosen expert, [N, K]; 0 for "no expert"."""
        if self.ranks.equal:
            sums_NK = values_NKW.sum(-1)
            if self.may_select_null:
                sums_NK = sums_NK.masked_fill(self.ids_NK == len(self.ranks.ranks), 0.0)
        else:
            sums_NK = values_NKW.masked_fill(self._to == self.ranks.total, 0.0).sum(-1)
        return self.ranks.scale_chosen(sums_NK, self.ids_NK)


def _grid_rows(ids_NK: Tensor, places: int) -> Tensor:
    """Where the experts of each token stand when the tokens' places lie one behind the other, [N · K]."""
    starts_N = torch.arange(0, len(ids_NK) * places, places, device=ids_NK.device)
    return (ids_NK + starts_N[:, None]).flatten()
