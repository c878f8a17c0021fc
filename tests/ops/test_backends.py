"""Every form with chosen experts against the loop in float64: forward, gradients, odd shapes, dtypes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from support.mixtures import Mixture, distance, draw_mixture, poisoned
from torch import Tensor

from peft_moe.errors import PeftMoeError
from peft_moe.ops import BACKENDS, mix
from peft_moe.ops.token_groups import group

SPARSE_BACKENDS = ["stacked", "grouped", "gather"]
# (tokens, in, out, ranks, chosen): odd sizes, unequal ranks, experts without ranks, one token, all chosen;
# "native" fits torch's grouped GEMM in float32, and has bins in narrower dtypes.
SHAPES = [
    pytest.param(37, 40, 48, (4,) * 5, 2, id="native"),
    pytest.param(37, 33, 65, (2, 0, 7, 4), 3, id="unequal"),
    pytest.param(37, 9, 5, (3,) * 6, 2, id="odd"),
    pytest.param(1, 24, 40, (3, 0, 5), 1, id="one-token"),
    pytest.param(3, 16, 16, (8, 8), 2, id="all-chosen"),
    pytest.param(20, 17, 3, (1, 20, 1), 1, id="one-chosen"),
    pytest.param(5, 1, 1, (1, 2), 2, id="one-feature"),
    pytest.param(6, 16, 20, (6,), 1, id="one-expert"),
]
# Of the largest entry. Sums of up to 65 products in another order: 65 · 2^-53 and 65 · 2^-24, with room. In
# narrow dtypes h, the gates, their product and y are rounded, by up to 2^-8 each, or 2^-11 for fp16.
BOUNDS = [
    pytest.param(torch.float64, 1e-13, id="fp64"),
    pytest.param(torch.float32, 1e-5, id="fp32"),
    pytest.param(torch.bfloat16, 4 * 2**-8, id="bf16"),
    pytest.param(torch.float16, 4 * 2**-11, id="fp16"),
]


def draw(*args: Any, dtype: torch.dtype, **kwargs: Any) -> Mixture:
    """As in a model of that dtype: gates are float32 at least."""
    m = draw_mixture(*args, dtype=dtype, **kwargs)
    if dtype == torch.float64:
        m.weights = m.weights.double()
    return m


def call(backend: str, m: Mixture, weights: Tensor | None = None) -> Tensor:
    weights = m.weights if weights is None else weights
    return mix(m.x, m.a, m.b, None, m.ranks, m.base, expert_ids_NK=m.ids, weights_NK=weights, backend=backend)


def gradients(run: Any, m: Mixture, direction: Tensor) -> tuple[Tensor, ...]:
    """Of x, A, B, the base and the chosen weights; those of "no expert" are left out."""
    leaves = [t.detach().clone().requires_grad_() for t in (m.x, m.a, m.b, m.base, m.weights)]
    own = Mixture(*leaves[:4], m.ids, leaves[4], m.ranks)
    found = list(torch.autograd.grad(run(own), leaves, direction, allow_unused=True, materialize_grads=True))
    found[4] = found[4].masked_fill(m.ids == len(m.ranks.ranks), 0.0)
    return tuple(found)


@pytest.fixture(autouse=True)
def _poison():
    with poisoned():
        yield


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize(("tokens", "width", "out", "ranks", "chosen"), SHAPES)
@pytest.mark.parametrize("backend", SPARSE_BACKENDS)
def test_forward_and_gradients(backend, tokens, width, out, ranks, chosen, dtype, bound):
    m = draw(tokens, width, out, ranks, chosen, dtype=dtype)
    found = call(backend, m)
    assert found.dtype == dtype
    assert distance(found, m.wanted()) <= bound
    direction = torch.randn(tokens, out, generator=torch.Generator().manual_seed(5)).to(dtype)
    mine = gradients(partial(call, backend), m, direction)
    wide = m.wide()
    loop = gradients(
        lambda own: mix(own.x, own.a, own.b, own.dense, own.ranks, own.base, backend="reference"),
        wide,
        direction.double(),
    )
    for name, one, other in zip(("x", "A", "B", "base", "weights"), mine, loop, strict=True):
        assert distance(one, other) <= bound, name


@pytest.mark.parametrize("backend", ["stacked", "gather"])
@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
def test_one_choice_for_all_tokens(backend, dtype, bound):
    m = draw(19, 24, 40, (8, 3, 8, 5), 2, dtype=dtype, none=False)
    m.ids, m.weights = m.ids[:1], m.weights[:1]
    wide = m.wide()
    gates = wide.weights.new_zeros(1, 4).scatter(1, m.ids, wide.weights)
    assert distance(call(backend, m), m.wanted(gates.expand(19, 4))) <= bound


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize("ranks", [(4, 4, 4), (16,), (2, 5, 0)])
def test_one_row_of_gates_folds_into_one_lora(ranks, dtype, bound):
    m = draw_mixture(23, 20, 36, ranks, 1, dtype=dtype)
    gates = torch.randn(1, len(ranks), generator=torch.Generator().manual_seed(3))
    gates = gates.double() if dtype == torch.float64 else gates
    leaves = [t.clone().requires_grad_() for t in (m.x, m.a, m.b, gates)]
    out = mix(*leaves, m.ranks, m.base, backend="folded")
    assert distance(out, m.wanted(gates.expand(23, -1))) <= bound
    direction = torch.randn(23, 36, generator=torch.Generator().manual_seed(5)).to(dtype)
    found = torch.autograd.grad(out, leaves, direction)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    looped = mix(*wide, m.ranks, m.base.double(), backend="reference")
    loop = torch.autograd.grad(looped, wide, direction.double())
    for name, one, other in zip(("x", "A", "B", "gates"), found, loop, strict=True):
        # One number per expert, a sum over all tokens whose terms cancel.
        assert distance(one, other) <= (4 * bound if name == "gates" else bound), name


@pytest.mark.parametrize("backend", SPARSE_BACKENDS)
def test_non_contiguous_inputs(backend):
    m = draw_mixture(9, 16, 24, (4, 4, 4), 2)
    wanted = m.wanted()
    wide = torch.full((18, 40), float("nan"))
    wide[::2, :16], wide[1::2, 16:] = m.x, m.base
    m.x, m.base = wide[::2, :16], wide[1::2, 16:]
    m.a, m.b, m.ids, m.weights = (t.T.contiguous().T for t in (m.a, m.b, m.ids, m.weights))
    assert distance(call(backend, m), wanted) <= 1e-5
    direction = torch.ones(1).expand(9, 24)  # as of a sum
    weights = m.weights.clone().requires_grad_()
    call(backend, m, weights).backward(direction)
    wanted_dw = m.wanted_gradients(torch.ones(9, 24))[1].masked_fill(m.ids == 3, 0.0)
    assert distance(weights.grad.masked_fill(m.ids == 3, 0.0), wanted_dw) <= 1e-5


@pytest.mark.parametrize("backend", SPARSE_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_tokens_on_one_expert(backend, dtype):
    m = draw_mixture(75, 24, 16, (4,) * 6, 1, none=False, among=1, dtype=dtype)
    assert (m.ids == 0).all()
    assert distance(call(backend, m), m.wanted()) <= (1e-5 if dtype == torch.float32 else 4 * 2**-8)


@pytest.mark.parametrize("among", [2, 5, 16])
def test_uneven_choices_in_narrow_dtypes(among):
    # Most experts are empty, one has nearly all: tiles, with gradients of the factors as well.
    m = draw(120, 24, 40, (8,) * 16, 2, dtype=torch.bfloat16, among=among)
    groups = group(m.ids, m.ranks, native=False, dtype=torch.bfloat16)
    assert groups.layout == ("bins" if among == 16 else "tiles")
    assert groups.shape[0] * groups.shape[1] <= 4 * len(groups.tokens) + 8 * 16
    assert len(groups.slots.unique()) == len(groups.tokens)
    direction = torch.randn(120, 40, generator=torch.Generator().manual_seed(5)).bfloat16()
    assert distance(call("grouped", m), m.wanted()) <= 4 * 2**-8
    mine = gradients(partial(call, "grouped"), m, direction)
    loop = gradients(
        lambda own: mix(own.x, own.a, own.b, own.dense, own.ranks, own.base, backend="reference"),
        m.wide(),
        direction.double(),
    )
    for one, other in zip(mine, loop, strict=True):
        assert distance(one, other) <= 4 * 2**-8


@pytest.mark.parametrize("backend", SPARSE_BACKENDS)
def test_a_broken_expert_touches_nobody_who_did_not_choose_it(backend):
    m = draw_mixture(40, 24, 16, (4,) * 4, 2, none=False)
    m.a[4:8] = 1e38  # h of the second expert is infinite
    out, chose = call(backend, m), (m.ids == 1).any(-1)
    assert chose.any()
    assert not chose.all()
    assert not torch.isfinite(out[chose]).all()
    assert distance(out[~chose], m.wanted()[~chose]) <= 1e-5


@pytest.mark.parametrize("backend", SPARSE_BACKENDS)
def test_autocast_multiplies_narrow_and_leaves_the_base_dtype(backend):
    m = draw_mixture(33, 24, 16, (8,) * 4, 2)
    weights = m.weights.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = call(backend, m, weights)
    out.square().sum().backward()
    assert out.dtype == torch.float32
    assert torch.isfinite(weights.grad).all()
    # x, A, h, its gated copy and B are rounded to bf16, 2^-8 each; rounded they must be, or the cast is void.
    assert 1e-5 < distance(out, m.wanted()) <= 5 * 2**-8


@pytest.mark.parametrize("backend", [name for name in BACKENDS if "triton" not in name])
def test_a_second_derivative_is_right_or_refused(backend):
    m = draw(7, 8, 8, (4,) * 3, 2, dtype=torch.float64, none=False)
    gates = m.weights[:1] if backend == "folded" else m.weights
    leaf = gates.clone().requires_grad_()
    if backend == "folded":
        dense = leaf.new_zeros(1, 3).scatter(1, m.ids[:1], leaf)
        out = mix(m.x, m.a, m.b, dense, m.ranks, m.base, backend=backend)
    else:
        out = call(backend, m, leaf)
    (first,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    if backend in ("stacked", "grouped"):
        with pytest.raises(PeftMoeError, match="second derivative"):
            first.sum().backward()
    else:
        first.sum().backward()
        assert leaf.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [*SPARSE_BACKENDS, "folded", "dense"])
def test_the_sum_takes_the_place_of_a_base_that_nobody_needs(backend, dtype):
    m = draw_mixture(9, 16, 24, (8, 8, 8), 2, none=False, dtype=dtype)
    if backend in SPARSE_BACKENDS:
        run = partial(
            mix, m.x, m.a, m.b, None, m.ranks, expert_ids_NK=m.ids, weights_NK=m.weights, backend=backend
        )
    else:
        gates = m.dense if backend == "dense" else m.dense[:1]
        run = partial(
            mix, m.x, m.a, m.b, gates, m.ranks, backend="stacked" if backend == "dense" else backend
        )
    before = m.base.clone()
    kept = run(m.base)
    assert torch.equal(m.base, before)
    with torch.no_grad():
        written = run(m.base, overwrite=True)
    assert written.data_ptr() == m.base.data_ptr()
    assert torch.equal(written, kept)
    # A graph may need the base's output, and gets a sum of its own.
    m.base = before.clone().requires_grad_()
    assert torch.equal(run(m.base, overwrite=True), kept)
    assert torch.equal(m.base, before)
