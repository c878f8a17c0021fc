"""Every Triton kernel in Triton's interpreter.

Pytest does not collect this file. test_triton.py runs it in another process, because the interpreter must be
chosen before the kernels are imported.
"""

from __future__ import annotations

import pytest
import torch
from support.mixtures import distance, draw_mixture, poisoned

from peft_moe.ops.triton.common import Tiles, rank_tables
from peft_moe.ops.triton.mix import mix_fused, mix_gathered, mix_sorted
from peft_moe.ops.triton.schedule import make_schedule
from peft_moe.ops.triton.stacked import stacked_expand, stacked_shrink

# (tokens, in, out, ranks, chosen): odd sizes, unequal ranks, experts without ranks, one token, all chosen.
SHAPES = [
    pytest.param(37, 40, 50, (4,) * 5, 2, id="equal"),
    pytest.param(37, 33, 65, (2, 0, 7, 4), 3, id="unequal"),
    pytest.param(1, 24, 40, (3, 0, 5), 1, id="one-token"),
    pytest.param(3, 16, 16, (8, 8), 2, id="all-chosen"),
    pytest.param(20, 17, 3, (1, 20, 1), 1, id="one-chosen"),
    pytest.param(5, 1, 1, (1, 2), 2, id="one-feature"),
    pytest.param(48, 64, 48, (16,) * 5, 3, id="tiles-full"),
    pytest.param(4, 16, 20, (6,), 1, id="one-expert"),
]
# Sums of up to 65 float32 products in another order than in float64: 65 · 2^-24 of the largest entry.
FLOAT32 = 5e-6
# h, each slot's partial sum and the output are converted, at most four times here. The interpreter truncates
# bf16, by up to 2^-8 each time; it rounds fp16, by up to 2^-11.
NARROW = [
    pytest.param(torch.bfloat16, 4 * 2**-8, id="bf16"),
    pytest.param(torch.float16, 4 * 2**-11, id="fp16"),
]


def call(backend, m, weights=None):
    weights = m.weights if weights is None else weights
    if backend == "gather":
        return mix_gathered(m.x, m.a, m.b, m.ranks, m.base, m.ids, weights)
    if backend == "sorted":
        return mix_sorted(m.x, m.a, m.b, m.ranks, m.base, m.ids, weights)
    return mix_fused(m.x, m.a, m.b, m.ranks, m.base, weights, m.ids)


@pytest.fixture(autouse=True)
def _poison():
    with poisoned():
        yield


def test_new_memory_is_poisoned():
    assert torch.empty(7).isnan().all()
    assert torch.empty_like(torch.ones(7, dtype=torch.bfloat16)).isnan().all()
    assert (torch.empty(7, dtype=torch.int32) > 10**6).all()


@pytest.mark.parametrize("backend", ["gather", "sorted", "fused"])
@pytest.mark.parametrize(("tokens", "width", "out", "ranks", "chosen"), SHAPES)
def test_forward(backend, tokens, width, out, ranks, chosen):
    m = draw_mixture(tokens, width, out, ranks, chosen)
    assert distance(call(backend, m), m.expected()) <= FLOAT32


@pytest.mark.parametrize("backend", ["sorted", "fused"])
@pytest.mark.parametrize(("tokens", "width", "out", "ranks", "chosen"), SHAPES)
def test_gradients(backend, tokens, width, out, ranks, chosen):
    if backend == "fused" and (len(set(ranks)) > 1 or ranks[0] & (ranks[0] - 1)):
        pytest.skip("the backend refuses it: it needs equal ranks that are powers of two")
    m = draw_mixture(tokens, width, out, ranks, chosen, seed=1)
    x, weights, base = (t.clone().requires_grad_() for t in (m.x, m.weights, m.base))
    m.x, m.base = x, base
    direction = torch.randn(tokens, out)
    dx, dweights, dbase = torch.autograd.grad(call(backend, m, weights), (x, weights, base), direction)
    expected_dx, expected_dw = m.expected_gradients(direction)
    assert distance(dx, expected_dx) <= FLOAT32
    # The weight of "no expert" has no gradient.
    expected_dw = expected_dw.masked_fill(m.ids.cpu() == len(ranks), 0.0)
    assert distance(dweights, expected_dw) <= FLOAT32
    assert torch.equal(dbase, direction)


@pytest.mark.parametrize("rows", [23, 1], ids=["gates-per-token", "one-row"])
@pytest.mark.parametrize("ranks", [(4, 4, 4), (16,), (2, 5, 0)])
def test_dense_gates(rows, ranks):
    m = draw_mixture(23, 20, 36, ranks, 1)
    gates = torch.randn(rows, len(ranks), generator=torch.Generator().manual_seed(3))
    out = mix_fused(m.x, m.a, m.b, m.ranks, m.base, gates)
    assert distance(out, m.expected(gates)) <= FLOAT32
    if len(set(ranks)) == 1:
        x, leaf = m.x.clone().requires_grad_(), gates.clone().requires_grad_()
        direction = torch.randn(23, 36)
        mixed = mix_fused(x, m.a, m.b, m.ranks, m.base, leaf)
        dx, dgates = torch.autograd.grad(mixed, (x, leaf), direction)
        expected_dx, expected_dg = m.expected_gradients(direction, gates)
        assert distance(dx, expected_dx) <= FLOAT32
        # The gradient of one row is a sum over tokens that may cancel; the bound is relative to its terms.
        each = m.expected_gradients(direction, gates.expand(23, -1))[1]
        summed = each.abs().sum(0).max() if rows == 1 else each.abs().max()
        assert (dgates.double() - expected_dg).abs().max() <= FLOAT32 * summed


@pytest.mark.parametrize(("dtype", "bound"), NARROW)
@pytest.mark.parametrize("backend", ["gather", "sorted", "fused"])
def test_narrow_dtypes(backend, dtype, bound):
    m = draw_mixture(19, 48, 40, (8, 8, 8, 8), 2, dtype=dtype)
    out = call(backend, m)
    assert out.dtype == dtype
    assert distance(out, m.expected()) <= bound
    if backend != "gather":
        x, weights = m.x.clone().requires_grad_(), m.weights.clone().requires_grad_()
        m.x = x
        direction = torch.randn(19, 40).to(dtype)
        dx, dweights = torch.autograd.grad(call(backend, m, weights), (x, weights), direction)
        assert (dx.dtype, dweights.dtype) == (dtype, torch.float32)
        expected_dx, expected_dw = m.expected_gradients(direction)
        assert distance(dx, expected_dx) <= bound
        assert distance(dweights, expected_dw.masked_fill(m.ids == 4, 0.0)) <= bound


@pytest.mark.parametrize("backend", ["gather", "sorted", "fused"])
def test_a_wider_base_keeps_its_dtype(backend):
    m = draw_mixture(9, 16, 24, (8, 8), 1, dtype=torch.bfloat16)
    m.base = torch.randn(9, 24)
    assert call(backend, m).dtype == torch.float32
    assert distance(call(backend, m), m.expected()) <= 2 * 2**-8


@pytest.mark.parametrize("backend", ["gather", "sorted", "fused"])
def test_rows_with_a_stride_and_columns_with_one(backend):
    m = draw_mixture(9, 16, 24, (4, 4, 4), 2)
    expected = m.expected()
    packed = torch.full((18, 40), float("nan"))
    packed[::2, :16], packed[1::2, 16:] = m.x, m.base
    m.x, m.base = packed[::2, :16], packed[1::2, 16:]
    assert distance(call(backend, m), expected) <= FLOAT32
    m.x, m.ids, m.weights = (t.T.contiguous().T for t in (m.x, m.ids, m.weights))
    assert distance(call(backend, m), expected) <= FLOAT32


def test_an_expanded_gradient():
    m = draw_mixture(9, 16, 24, (4, 4, 4), 2)
    for backend in ("sorted", "fused"):
        weights = m.weights.clone().requires_grad_()
        call(backend, m, weights).sum().backward()
        expected = m.expected_gradients(torch.ones(9, 24))[1].masked_fill(m.ids == 3, 0.0)
        assert distance(weights.grad, expected) <= FLOAT32


def test_all_tokens_on_one_expert():
    m = draw_mixture(75, 20, 16, (4,) * 6, 1, with_null=False, among=1)
    assert (m.ids == 0).all()
    for backend in ("sorted", "fused", "gather"):
        assert distance(call(backend, m), m.expected()) <= FLOAT32


def test_no_token_has_an_expert():
    m = draw_mixture(20, 20, 16, (4, 4), 1)
    m.ids, m.weights = torch.full_like(m.ids, 2), torch.zeros_like(m.weights)
    for backend in ("sorted", "fused", "gather"):
        assert torch.equal(call(backend, m), m.base)


@pytest.mark.parametrize("backend", ["gather", "sorted"])
def test_a_broken_expert_spoils_only_the_tokens_that_chose_it(backend):
    m = draw_mixture(40, 16, 24, (4, 4, 4), 1)
    m.a[4:8], m.b[4:8] = float("inf"), float("nan")
    out = call(backend, m)
    assert torch.equal(out.isfinite().all(1), (m.ids != 1).all(1))


@pytest.mark.parametrize("backend", ["gather", "sorted", "fused"])
def test_the_same_bits_twice_and_the_same_result_in_another_batch(backend):
    m = draw_mixture(40, 32, 24, (4, 4, 4), 2)
    out = call(backend, m)
    assert torch.equal(call(backend, m), out)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    m.x, m.base, m.ids, m.weights = (t[order] for t in (m.x, m.base, m.ids, m.weights))
    # The interpreter uses NumPy's products, which round rows differently by their position; on a GPU the bits
    # are the same.
    assert distance(call(backend, m), out[order]) <= FLOAT32


@pytest.mark.parametrize(
    ("tokens", "experts", "rows"), [(1, 3, 16), (130, 5, 16), (64, 40, 32), (300, 2, 16)]
)
def test_the_schedule_holds_every_token_once(tokens, experts, rows):
    ids = draw_mixture(tokens, 1, 1, (1,) * experts, 2, seed=4).ids
    schedule = make_schedule(ids, experts, rows)
    for slot in range(2):
        groups, order = schedule.groups[slot], schedule.order[slot]
        used = groups <= experts
        assert (order[~used] == -1).all()
        blocks = order[used]
        assert sorted(blocks[blocks >= 0].tolist()) == list(range(tokens))
        for group, block in zip(groups[used].tolist(), blocks, strict=True):
            assert (ids[block[block >= 0].long(), slot] == group).all()
            # The sort is stable, so that the order of sums never changes.
            assert (block[block >= 0].diff() > 0).all()


@pytest.mark.parametrize("tiles", [Tiles(16, 32, 16), Tiles(32, 64, 32)])
def test_other_tiles_give_the_same(tiles):
    m = draw_mixture(33, 40, 50, (8,) * 5, 2)
    tables = rank_tables(m.ranks.ranks, m.ranks.scaling, m.x.device)
    hg, _ = stacked_shrink(m.x, m.a, m.weights, tables, expert_ids_NK=m.ids, tiles=tiles)
    assert distance(stacked_expand(hg, m.b, m.base, tiles=tiles), m.expected()) <= FLOAT32
    base = m.base.clone()
    assert stacked_expand(hg, m.b, base, in_place=True, tiles=tiles) is base
    assert distance(base, m.expected()) <= FLOAT32
