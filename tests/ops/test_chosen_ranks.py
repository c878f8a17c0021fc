"""The ranks of the chosen experts leave the rank axis and return to it; "no expert" leaves no trace."""

from __future__ import annotations

import pytest
import torch

from peft_moe.ops import RankMap
from peft_moe.ops.chosen_ranks import ChosenRanks

NULL = 3  # the id that stands for "no expert" among three
RANK_MAPS = [
    pytest.param(RankMap((2, 2, 2), (1.0, 1.0, 1.0)), id="equal"),
    pytest.param(RankMap((2, 1, 2), (1.0, 1.0, 1.0)), id="unequal"),
]


@pytest.mark.parametrize("ranks", RANK_MAPS)
def test_put_leaves_zeros_at_experts_that_were_not_chosen(ranks):
    ids_NK = torch.tensor([[0, 2], [2, 1]])
    chosen = ChosenRanks(ids_NK, ranks, may_select_null=False)
    values_NR = torch.arange(1.0, 2 * ranks.total + 1).view(2, -1)
    # The buffer still holds the products of all experts, as in a forward pass without gradients.
    put_NR = chosen.put(chosen.take(values_NR), values_NR.clone())
    owners_R = ranks.owners(torch.device("cpu"))
    is_chosen_NR = (ids_NK[:, :, None] == owners_R).any(1)
    assert torch.equal(put_NR, values_NR.where(is_chosen_NR, 0.0))


@pytest.mark.parametrize("ranks", RANK_MAPS)
def test_sums_of_no_expert_are_zero(ranks):
    # `take` may return anything for "no expert"; the gradient of its weight is zero all the same.
    ids_NK = torch.tensor([[0, NULL], [NULL, 1]])
    chosen = ChosenRanks(ids_NK, ranks, may_select_null=True)
    values_NKW = chosen.take(torch.ones(2, ranks.total))
    rank_of = torch.tensor([*map(float, ranks.ranks), 0.0])
    assert torch.equal(chosen.sums(values_NKW), rank_of[ids_NK])
