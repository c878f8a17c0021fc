"""Scores of a narrow input: the numbers and gradients of plain autograd, and no wide copy of the input."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import graph
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from peft_moe.routers import fp32_linear as module
from peft_moe.routers.fp32_linear import fp32_linear, widened


def drawn(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    made = (
        torch.randn(*shape, generator=source, dtype=torch.float64) for shape in ((2, 5, 12), (4, 12), (4,))
    )
    x, weight, bias = made
    wide = torch.promote_types(dtype, torch.float32)
    return x.to(dtype).requires_grad_(), weight.to(wide).requires_grad_(), bias.to(wide).requires_grad_()


@pytest.mark.parametrize("normed", [False, True])
def test_gradients(normed: bool) -> None:
    assert torch.autograd.gradcheck(lambda *given: fp32_linear(*given, normed), drawn(torch.float64))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_autograd_agrees_and_only_the_input_is_kept(dtype: torch.dtype, normed: bool) -> None:
    x, weight, bias = drawn(dtype)
    kept: list[torch.Tensor] = []
    with graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        scores = fp32_linear(x, weight, bias, normed)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), weight.data_ptr()}
    plain = functional.linear(widened(x, normed), weight, bias)
    assert torch.equal(scores, plain)
    direction = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(scores, (x, weight, bias), direction)
    wanted = torch.autograd.grad(plain, (x, weight, bias), direction)
    for one, other in zip(found, wanted, strict=True):
        # One rounding to the input's dtype apart, and float32 sums in another order.
        bound = 8e-3 if one.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(one, other, atol=bound, rtol=bound)


class Largest(TorchDispatchMode):
    """The most elements that a float32 result has."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.most = max(self.most, out.numel())
        return out


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("columns", [3, 5, 40])
@pytest.mark.parametrize("normed", [False, True])
def test_many_tokens_in_parts(
    normed: bool, columns: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 40 * 24 * 4)  # 32 rows at a time, in whole 16
    source = torch.Generator().manual_seed(2)
    x = torch.randn(3, 67, 24, generator=source).bfloat16().requires_grad_()
    weight = torch.randn(columns, 24, generator=source).requires_grad_()
    given = (x, weight, torch.randn(columns, generator=source).requires_grad_() if bias else None)
    direction = torch.randn(3, 67, columns, generator=source)
    leaves = [t for t in given if t is not None]
    plain = functional.linear(widened(x, normed), *given[1:])
    wanted = torch.autograd.grad(plain, leaves, direction)
    with torch.no_grad(), Largest() as seen:
        drawn = fp32_linear(*given, normed)
    torch.testing.assert_close(drawn, plain, atol=1e-5, rtol=1e-5)
    assert drawn.is_contiguous()
    # Nothing as large as the wide input.
    most = max(32 * 24, drawn.numel())
    assert seen.most <= most
    assert most < x.numel() or columns == 40
    with Largest() as seen:
        scores = fp32_linear(*given, normed)
        found = torch.autograd.grad(scores, leaves, direction)
    assert seen.most <= most
    assert torch.equal(scores, drawn)
    for one, other in zip(found, wanted, strict=True):
        bound = 8e-3 if one.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(one, other, atol=bound, rtol=bound)


@pytest.mark.parametrize("tokens", [2, 7, 64, 186])
@pytest.mark.parametrize("columns", range(2, 18))
def test_the_bits_do_not_depend_on_where_the_weights_lie(columns: int, tokens: int) -> None:
    # Of one vector they do, in MKL: a loaded model may differ in the last bits of one token.
    source = torch.Generator().manual_seed(3)
    x, weight = torch.randn(tokens, 100, generator=source), torch.randn(columns, 100, generator=source)
    bias = torch.randn(columns, generator=source)
    room = torch.empty(weight.numel() + 32)
    first = -(room.data_ptr() // 4) % 16
    with torch.no_grad():
        scores = []
        for shift in (0, 1, 2, 3, 8):
            moved = room[first + shift :][: weight.numel()].view_as(weight).copy_(weight)
            scores.append(fp32_linear(x, moved, bias, False))
    assert all(torch.equal(one, scores[0]) for one in scores)
