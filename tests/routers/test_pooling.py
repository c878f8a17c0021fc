"""One vector per prompt: what it may look at, and how its decision returns to the tokens."""

from __future__ import annotations

import pytest
import torch

from peft_moe.errors import PeftMoeError
from peft_moe.routers.pooling import POOLS, pool_prompts, spread_turns
from peft_moe.routing.context import Routing, RoutingContext


def hidden(rows=2, length=6, width=3):
    return torch.arange(rows * length * width, dtype=torch.float64).view(rows, length, width)


def mask(*rows):
    return torch.tensor([[c == "1" for c in row] for row in rows])


def test_mean_and_last_over_the_prompt():
    x = hidden()
    context = RoutingContext(prompt=mask("011000", "111100"))
    mean, last = (pool_prompts(x, context, how) for how in ("mean", "last"))
    torch.testing.assert_close(mean[:, 0], torch.stack([x[0, 1:3].mean(0), x[1, :4].mean(0)]))
    assert torch.equal(last[:, 0], torch.stack([x[0, 2], x[1, 3]]))


def test_without_masks_every_token_counts():
    x = hidden()
    torch.testing.assert_close(pool_prompts(x, RoutingContext(), "mean")[:, 0], x.mean(1))
    torch.testing.assert_close(pool_prompts(x, RoutingContext(), "last")[:, 0], x[:, -1])


def test_real_tokens_stand_in_for_an_unknown_prompt():
    x = hidden()
    context = RoutingContext(real=mask("001111", "111110"))
    torch.testing.assert_close(pool_prompts(x, context, "mean")[0, 0], x[0, 2:].mean(0))
    assert torch.equal(pool_prompts(x, context, "last")[1, 0], x[1, 4])


def test_one_vector_per_turn():
    x = hidden(1, 6)
    segment = torch.tensor([[0, 0, 0, 1, 1, 1]])
    context = RoutingContext(prompt=mask("110110"), segment=segment, num_segments=2)
    torch.testing.assert_close(
        pool_prompts(x, context, "mean")[0], torch.stack([x[0, :2].mean(0), x[0, 3:5].mean(0)])
    )
    assert torch.equal(pool_prompts(x, context, "last")[0], x[0, [1, 4]])


def test_a_missing_turn_is_zero():
    context = RoutingContext(
        prompt=mask("110110", "110000"),
        segment=torch.tensor([[0, 0, 0, 1, 1, 1], [0] * 6]),
        num_segments=2,
    )
    assert pool_prompts(hidden(), context, "mean")[1, 1].tolist() == [0, 0, 0]


def test_spread_turns_gives_each_token_its_turn():
    segment = torch.tensor([[0, 0, 1, 1, 2]])
    decision = torch.arange(6.0).view(1, 3, 2)
    selected = decision > 2
    routing = spread_turns(Routing(decision, decision * 10, selected), RoutingContext(segment=segment))
    assert routing.gates[0].tolist() == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5]]
    assert torch.equal(routing.logits, routing.gates * 10)
    assert torch.equal(routing.selected, routing.gates > 2)
    assert spread_turns(Routing(decision), RoutingContext()).gates is decision


@pytest.mark.parametrize("how", POOLS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("filler", [0.0, 1e6, torch.inf, torch.nan])
def test_padding_changes_nothing(how, side, filler):
    x = hidden()
    prompt = mask("011000", "111100")
    padding = torch.full((2, 3, 3), filler, dtype=x.dtype)
    empty = torch.zeros(2, 3, dtype=torch.bool)
    parts = (padding, x) if side == "left" else (x, padding)
    masks = (empty, prompt) if side == "left" else (prompt, empty)
    padded = pool_prompts(torch.cat(parts, 1), RoutingContext(prompt=torch.cat(masks, 1)), how)
    assert torch.equal(padded, pool_prompts(x, RoutingContext(prompt=prompt), how))


@pytest.mark.parametrize("how", POOLS)
def test_the_completion_is_never_read(how):
    x = hidden().requires_grad_()
    prompt = mask("011000", "111100")
    pool_prompts(x, RoutingContext(prompt=prompt), how).square().sum().backward()
    assert (x.grad[~prompt] == 0).all()
    read = prompt if how == "mean" else mask("001000", "000100")
    assert (x.grad[read] != 0).all()


@pytest.mark.parametrize("how", POOLS)
def test_a_turn_does_not_read_later_turns(how):
    x = hidden(1, 6).requires_grad_()
    segment = torch.tensor([[0, 0, 0, 1, 1, 1]])
    context = RoutingContext(prompt=mask("110110"), segment=segment, num_segments=2)
    pool_prompts(x, context, how)[0, 0].sum().backward()
    assert (x.grad[0, 3:] == 0).all()
    assert (x.grad[0, 1] != 0).all()


def test_row_without_prompt_is_refused():
    context = RoutingContext(prompt=mask("000000", "110000"), prompt_missing=True)
    with pytest.raises(PeftMoeError, match=r"router_granularity='sequence'.*prompt/completion"):
        pool_prompts(hidden(), context, "mean")


def test_mask_of_other_tokens_is_refused():
    with pytest.raises(PeftMoeError, match=r"\(2, 3\).*\(2, 6\)"):
        pool_prompts(hidden(), RoutingContext(prompt=mask("111", "111")), "mean")
