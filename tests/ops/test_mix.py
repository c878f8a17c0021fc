"""The stacked backend equals the reference loop: forward, gradients, odd shapes, dtypes; and the rank map."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_moe.ops import RankMap, folded_delta, mix, mix_reference

mix_stacked = partial(mix, backend="stacked")

# (tokens, in, out, ranks): odd sizes, unequal ranks, empty experts, one token, no token, no rank at all.
SHAPES = [
    pytest.param(7, 5, 3, (2, 2, 2), id="equal"),
    pytest.param(7, 5, 3, (4, 1, 3), id="unequal"),
    pytest.param(1, 5, 3, (2, 3), id="one-token"),
    pytest.param(0, 5, 3, (2, 3), id="no-token"),
    pytest.param(9, 1, 1, (1, 2, 1), id="one-feature"),
    pytest.param(6, 11, 13, (0, 3, 0, 2), id="empty-experts"),
    pytest.param(6, 11, 13, (3, 0), id="last-empty"),
    pytest.param(4, 3, 2, (0, 0), id="no-rank"),
    pytest.param(5, 4, 6, (9,), id="one-expert"),
]


def problem(tokens, width, out, ranks, dtype=torch.float64, rows=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    total = sum(ranks)
    scaling = tuple(0.5 + 0.75 * e for e in range(len(ranks)))
    gates = draw(tokens if rows is None else rows, len(ranks))
    tensors = (draw(tokens, width), draw(total, width), draw(total, out), gates, draw(tokens, out))
    return tensors, RankMap(ranks, scaling)


def run(op, tensors, ranks):
    x, a, b, gates, base = tensors
    return op(x, a, b, gates, ranks, base)


@pytest.mark.parametrize("rows", [None, 1], ids=["gates-per-token", "one-row-of-gates"])
@pytest.mark.parametrize(("tokens", "width", "out", "ranks"), SHAPES)
def test_stacked_equals_reference_forward_and_gradients(tokens, width, out, ranks, rows):
    tensors, rank_map = problem(tokens, width, out, ranks, rows=rows)
    results = [run(op, tensors, rank_map) for op in (mix_reference, mix_stacked)]
    torch.testing.assert_close(results[1], results[0], atol=1e-12, rtol=1e-12)
    direction = torch.linspace(-1, 1, max(results[0].numel(), 1), dtype=torch.float64)
    direction = direction[: results[0].numel()].view_as(results[0])
    expected, actual = (
        torch.autograd.grad(r, tensors, direction, allow_unused=True, materialize_grads=True) for r in results
    )
    for name, exact, gradient in zip(["x", "A", "B", "gates", "base"], expected, actual, strict=True):
        torch.testing.assert_close(
            gradient, exact, atol=1e-12, rtol=1e-12, msg=lambda m, n=name: f"d{n}: {m}"
        )


@pytest.mark.parametrize("op", [mix_reference, mix_stacked])
def test_gradcheck(op):
    tensors, rank_map = problem(3, 4, 2, (2, 0, 1))
    assert torch.autograd.gradcheck(lambda *t: run(op, t, rank_map), tensors)


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.lists(st.integers(0, 5), min_size=1, max_size=5).map(tuple),
    tokens=st.integers(1, 6),
    width=st.integers(1, 9),
    out=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_any_shape(ranks, tokens, width, out, seed):
    tensors, rank_map = problem(tokens, width, out, ranks, seed=seed)
    torch.testing.assert_close(run(mix_stacked, tensors, rank_map), run(mix_reference, tensors, rank_map))


def test_non_contiguous_inputs():
    (x, a, b, gates, base), ranks = problem(6, 5, 4, (2, 1))
    expected = run(mix_reference, (x, a, b, gates, base), ranks)
    twisted = [t.detach().T.contiguous().T for t in (x, a, b, gates, base)]
    assert not any(t.is_contiguous() for t in twisted)
    torch.testing.assert_close(run(mix_stacked, twisted, ranks), expected)
    # A slice of a packed batch has rows with a stride.
    packed = torch.zeros(12, 5, dtype=torch.float64)
    packed[::2] = x.detach()
    torch.testing.assert_close(run(mix_stacked, [packed[::2], a, b, gates, base], ranks), expected)


# Relative to the largest entry. bf16 has 8 bits: x, h, gates, B and the sum are each rounded by at most 2^-9,
# so that the error of a product of these 5 stays below 5·2^-9 ≈ 1e-2; fp16 is 8 times finer.
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float16, 1.3e-3), (torch.float32, 2e-6)]
)
def test_narrow_dtypes_within_bounds(dtype, bound):
    tensors, ranks = problem(64, 48, 40, (8, 4, 8), dtype=dtype)
    x, a, b, gates, base = tensors
    actual = mix_stacked(x, a, b, gates.float(), ranks, base)
    expected = run(mix_reference, [t.detach().double() for t in tensors], ranks)
    assert actual.dtype == dtype
    assert (actual.double() - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("experts", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_result_has_the_dtype_of_the_base(experts, base):
    (x, a, b, gates, out), ranks = problem(8, 6, 5, (2, 1), dtype=torch.float32)
    actual = mix_stacked(x.to(base), a.to(experts), b.to(experts), gates, ranks, out.to(base))
    expected = mix_reference(x, a, b, gates, ranks, out)
    assert actual.dtype == base
    bound = 1e-5 if experts == base == torch.float32 else 3e-2
    assert (actual.float() - expected).abs().max() <= bound * expected.abs().max()


def test_autocast_leaves_the_base_dtype():
    (x, a, b, gates, base), ranks = problem(8, 6, 5, (2, 1), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = mix_stacked(x, a, b, gates, ranks, base)
    expected = mix_reference(x, a, b, gates, ranks, base)
    assert actual.dtype == torch.float32
    assert (actual - expected).abs().max() <= 3e-2 * expected.abs().max()


def test_zero_gates_give_the_base_bit_for_bit():
    (x, a, b, gates, base), ranks = problem(8, 6, 5, (2, 1), dtype=torch.float32)
    assert torch.equal(mix_stacked(x, a, b, torch.zeros_like(gates), ranks, base), base)


def test_permuted_experts_give_the_same():
    (x, a, b, gates, base), ranks = problem(8, 6, 5, (2, 0, 3))
    order = [2, 0, 1]
    parts = ranks.slices()
    moved = RankMap(tuple(ranks.ranks[e] for e in order), tuple(ranks.scaling[e] for e in order))
    a2, b2 = (torch.cat([t[parts[e]] for e in order]) for t in (a, b))
    torch.testing.assert_close(
        mix_stacked(x, a2, b2, gates[:, order], moved, base), mix_stacked(x, a, b, gates, ranks, base)
    )


@pytest.mark.parametrize("ranks", [(2, 2), (3, 1), (0, 2), (1,)])
def test_folded_delta_is_the_weight_of_constant_gates(ranks):
    (x, a, b, gates, base), rank_map = problem(7, 5, 4, ranks, rows=1)
    delta_oi = folded_delta(a, b, gates[0], rank_map)
    assert delta_oi.shape == (4, 5)
    torch.testing.assert_close(base + x @ delta_oi.T, mix_reference(x, a, b, gates, rank_map, base))


class TestRankMap:
    def test_slices_cover_the_rank_axis_in_order(self):
        ranks = RankMap((2, 0, 3), (1.0, 1.0, 1.0))
        assert ranks.slices() == [slice(0, 2), slice(2, 2), slice(2, 5)]
        assert ranks.total == 5

    @pytest.mark.parametrize(("ranks", "expected"), [((1, 3), [2.0, 30, 30, 30]), ((2, 2), [2.0, 2, 30, 30])])
    def test_expand(self, ranks, expected):
        gates = torch.tensor([[1.0, 3.0]])
        assert RankMap(ranks, (2.0, 10.0)).expand(gates).tolist() == [expected]

    def test_lengths_must_agree(self):
        with pytest.raises(AssertionError):
            RankMap((1, 2), (1.0,))

    def test_scaling_is_not_rounded_by_an_earlier_narrow_use(self):
        ranks = RankMap((1, 2), (1 / 3, 1.0))
        ranks.expand(torch.ones(1, 2, dtype=torch.bfloat16))
        assert ranks.expand(torch.ones(1, 2, dtype=torch.float64))[0, 0].item() == 1 / 3

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_first_use_under_inference_mode_does_not_spoil_training(self, dtype):
        ranks = RankMap((1, 2), (1.0, 2.0))
        with torch.inference_mode():
            ranks.expand(torch.ones(1, 2, dtype=dtype))
        gates = torch.ones(1, 2, dtype=dtype, requires_grad=True)
        ranks.expand(gates).sum().backward()
        assert gates.grad is not None
        assert gates.grad.tolist() == [[1.0, 4.0]]

    def test_copies_are_equal_and_apart(self):
        ranks = RankMap((1, 2), (1.0, 2.0))
        ranks.expand(torch.ones(1, 2))
        twin = copy.deepcopy(ranks)
        assert twin == ranks
        assert isinstance(twin.expand(torch.ones(1, 2)), Tensor)
