"""The running summary against a plain loop over tokens."""

from __future__ import annotations

import pytest
import torch

from peft_moe.routers import running
from peft_moe.routers.running import running_features
from peft_moe.routing.context import RoutingContext

HALF_LIFE = 3.0
DECAY = 0.5 ** (1 / HALF_LIFE)


def by_loop(x, real, prompt, turn, before):
    """One row, token by token, in float64."""
    out, state = [], before
    for t in range(len(x)):
        if prompt[t]:
            own = [s for s in range(len(x)) if prompt[s] and turn[s] == turn[t]]
            state = torch.stack([x[s] for s in own]).mean(0)
        elif real[t]:
            state = DECAY * state + (1 - DECAY) * x[t]
        out.append(state)
    return torch.stack(out)


def case(*rows):
    """Rows of "p" prompt, "c" completion, "." padding; a "p" behind a "c" begins a turn."""
    prompt = torch.tensor([[c == "p" for c in row] for row in rows])
    real = torch.tensor([[c != "." for c in row] for row in rows])
    starts = prompt & ~torch.nn.functional.pad(prompt, (1, 0))[:, :-1]
    turn = (starts.cumsum(-1) - 1).clamp_min(0)
    x = torch.randn(*prompt.shape, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turns = int(turn.max()) + 1
    context = RoutingContext(
        real=real, prompt=prompt, segment=turn if turns > 1 else None, num_segments=turns
    )
    return x, real, prompt, turn, context


@pytest.mark.parametrize("chunk", [128, 3])
@pytest.mark.parametrize("rows", [("ppcccc",), ("ppccppcc", "pccccc.."), ("..ppcccc", "ppppcccc")])
def test_is_the_recurrence(rows, chunk, monkeypatch):
    monkeypatch.setattr(running, "_CHUNK", chunk)
    x, real, prompt, turn, context = case(*rows)
    got = running_features(x, context, "mean", HALF_LIFE, None)
    for row in range(len(rows)):
        wanted = by_loop(x[row], real[row], prompt[row], turn[row], torch.zeros(4, dtype=torch.float64))
        torch.testing.assert_close(got[row][real[row]], wanted[real[row]], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_call_continues_where_the_last_one_stopped(cut):
    x, _, _, _, context = case("ppppcccccc")
    whole = running_features(x, context, "mean", HALF_LIFE, None)
    first = running_features(
        x[:, : 4 + cut], RoutingContext(prompt=context.prompt[:, : 4 + cut]), "mean", HALF_LIFE, None
    )
    rest = running_features(x[:, 4 + cut :], RoutingContext(), "mean", HALF_LIFE, first[:, -1])
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, atol=1e-12, rtol=1e-12)


def test_without_any_mark_a_first_call_is_all_prompt():
    x = case("pppp")[0]
    got = running_features(x, RoutingContext(), "mean", HALF_LIFE, None)
    torch.testing.assert_close(got, x.mean(1, keepdim=True).expand_as(x))


def test_a_row_without_prompt_starts_from_its_first_token():
    x, real, prompt, turn, context = case(".ccccc", "ppcccc")
    assert not prompt[0].any()
    got = running_features(x, context, "mean", HALF_LIFE, None)[0, 1:]
    wanted = by_loop(x[0, 1:], real[0, 1:], torch.tensor([True] + [False] * 4), turn[0, 1:], x[0, 1])
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)


def test_a_new_subject_takes_over_within_the_half_life():
    x = torch.cat([torch.zeros(1, 10, 1), torch.ones(1, 12, 1)], dim=1)
    prompt = torch.zeros(1, 22, dtype=torch.bool)
    prompt[:, :4] = True
    got = running_features(x, RoutingContext(prompt=prompt), "mean", HALF_LIFE, None)[0, :, 0]
    assert got[9] == 0
    torch.testing.assert_close(got[12], torch.tensor(0.5))
    torch.testing.assert_close(got[15], torch.tensor(0.75))


def test_padding_may_hold_anything():
    x, real, _, _, context = case("..ppcc", "ppcc..")
    clean = running_features(x, context, "mean", HALF_LIFE, None)
    dirty = running_features(torch.where(real[..., None], x, torch.nan), context, "mean", HALF_LIFE, None)
    assert torch.equal(dirty[real], clean[real])
