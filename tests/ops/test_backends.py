"""Every backend equals the reference loop in float64: forward, gradients, odd shapes, dtypes."""

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
# Relative to the largest entry. Sums of up to 65 products in another order differ by 65 · 2^-53 or
# 65 · 2^-24, and the bounds leave room. In bf16, h, the gates, their product and y are rounded by up to 2^-8
# each, in fp16 by up to 2^-11.
BOUNDS = [
    pytest.param(torch.float64, 1e-13, id="fp64"),
    pytest.param(torch.float32, 1e-5, id="fp32"),
    pytest.param(torch.bfloat16, 4 * 2**-8, id="bf16"),
    pytest.param(torch.float16, 4 * 2**-11, id="fp16"),
]


def draw(*args: Any, dtype: torch.dtype, **kwargs: Any) -> Mixture:
    """Draw a mixture as a model of that dtype has it: gates are at least float32."""
    m = draw_mixture(*args, dtype=dtype, **kwargs)
    if dtype == torch.float64:
        m.weights = m.weights.double()
    return m


def call(backend: str, m: Mixture, weights: Tensor | None = None) -> Tensor:
    weights = m.weights if weights is None else weights
    return mix(m.x, m.a, m.b, None, m.ranks, m.base, expert_ids_NK=m.ids, weights_NK=weights, backend=backend)


def gradients(run: Any, m: Mixture, direction: Tensor) -> tuple[Tensor, ...]:
    """Return gradients of x, A, B, the base and the chosen weights, with zeros for "no expert"."""
    leaves = [t.detach().clone().requires_grad_() for t in (m.x, m.a, m.b, m.base, m.weights)]
    copied = Mixture(*leaves[:4], m.ids, leaves[4], m.ranks)
    out = run(copied)
    results = list(torch.autograd.grad(out, leaves, direction, allow_unused=True, materialize_grads=True))
    results[4] = results[4].masked_fill(m.ids == len(m.ranks.ranks), 0.0)
    return tuple(results)


def reference(m: Mixture) -> Tensor:
    return mix(m.x, m.a, m.b, m.dense, m.ranks, m.base, backend="reference")


@pytest.fixture(autouse=True)
def _poison():
    with poisoned():
        yield


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize(("tokens", "width", "out", "ranks", "chosen"), SHAPES)
@pytest.mark.parametrize("backend", SPARSE_BACKENDS)
def test_forward_and_gradients(backend, tokens, width, out, ranks, chosen, dtype, bound):
    m = draw(tokens, width, out, ranks, chosen, dtype=dtype)
    out_NO = call(backend, m)
    assert out_NO.dtype == dtype
    assert distance(out_NO, m.expected()) <= bound
    direction = torch.randn(tokens, out, generator=torch.Generator().manual_seed(5)).to(dtype)
    actual = gradients(partial(call, backend), m, direction)
    expected = gradients(reference, m.fp64(), direction.double())
    for name, gradient, exact in zip(("x", "A", "B", "base", "weights"), actual, expected, strict=True):
        assert distance(gradient, exact) <= bound, name


@pytest.mark.parametrize("ranks", [(4,) * 5, (2, 0, 7, 4)], ids=["equal", "unequal"])
@pytest.mark.parametrize("backend", SPARSE_BACKENDS)
def test_forward_without_gradients_where_no_choice_is_null(backend, ranks):
    m = draw_mixture(37, 40, 48, ranks, 2, with_null=False)
    with torch.no_grad():
        out_NO = mix(
            m.x, m.a, m.b, None, m.ranks, m.base,
            expert_ids_NK=m.ids, weights_NK=m.weights, may_select_null=False, backend=backend,
        )  # fmt: skip
    assert distance(out_NO, m.expected()) <= 1e-5


@pytest.mark.parametrize("backend", ["stacked", "gather"])
@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
def test_one_choice_for_all_tokens(backend, dtype, bound):
    m = draw(19, 24, 40, (8, 3, 8, 5), 2, dtype=dtype, with_null=False)
    m.ids, m.weights = m.ids[:1], m.weights[:1]
    weights = m.fp64().weights
    gates = weights.new_zeros(1, 4).scatter(1, m.ids, weights)
    assert distance(call(backend, m), m.expected(gates.expand(19, 4))) <= bound


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize("ranks", [(4, 4, 4), (16,), (2, 5, 0)])
def test_one_row_of_gates_folds_into_one_lora(ranks, dtype, bound):
    m = draw_mixture(23, 20, 36, ranks, 1, dtype=dtype)
    gates = torch.randn(1, len(ranks), generator=torch.Generator().manual_seed(3))
    gates = gates.double() if dtype == torch.float64 else gates
    leaves = [t.clone().requires_grad_() for t in (m.x, m.a, m.b, gates)]
    out = mix(*leaves, m.ranks, m.base, backend="folded")
    assert distance(out, m.expected(gates.expand(23, -1))) <= bound
    direction = torch.randn(23, 36, generator=torch.Generator().manual_seed(5)).to(dtype)
    actual = torch.autograd.grad(out, leaves, direction)
    fp64_leaves = [t.detach().double().requires_grad_() for t in leaves]
    fp64_out = mix(*fp64_leaves, m.ranks, m.base.double(), backend="reference")
    expected = torch.autograd.grad(fp64_out, fp64_leaves, direction.double())
    for name, gradient, exact in zip(("x", "A", "B", "gates"), actual, expected, strict=True):
        # A gate's gradient is a sum over all tokens whose terms cancel.
        assert distance(gradient, exact) <= (4 * bound if name == "gates" else bound), name


@pytest.mark.parametrize("backend", SPARSE_BACKENDS)
def test_non_contiguous_inputs(backend):
    m = draw_mixture(9, 16, 24, (4, 4, 4), 2)
    expected = m.expected()
    packed = torch.full((18, 40), float("nan"))
    packed[::2, :16], packed[1::2, 16:] = m.x, m.base
    m.x, m.base = packed[::2, :16], packed[1::2, 16:]
    m.a, m.b, m.ids, m.weights = (t.T.contiguous().T for t in (m.a, m.b, m.ids, m.weights))
    assert distance(call(backend, m), expected) <= 1e-5
    direction = torch.ones(1).expand(9, 24)  # the gradient of a sum
    weights = m.weights.clone().requires_grad_()
    call(backend, m, weights).backward(direction)
    expected_dw = m.expected_gradients(torch.ones(9, 24))[1].masked_fill(m.ids == 3, 0.0)
    assert distance(weights.grad.masked_fill(m.ids == 3, 0.0), expected_dw) <= 1e-5


@pytest.mark.parametrize("backend", SPARSE_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_tokens_on_one_expert(backend, dtype):
    m = draw_mixture(75, 24, 16, (4,) * 6, 1, with_null=False, among=1, dtype=dtype)
    assert (m.ids == 0).all()
    assert distance(call(backend, m), m.expected()) <= (1e-5 if dtype == torch.float32 else 4 * 2**-8)


@pytest.mark.parametrize("among", [2, 5, 16])
def test_uneven_choices_in_narrow_dtypes(among):
    # With few experts among the chosen, most groups are empty and one is large, which selects tiles.
    m = draw(120, 24, 40, (8,) * 16, 2, dtype=torch.bfloat16, among=among)
    groups = group(m.ids, m.ranks, native=False, dtype=torch.bfloat16)
    assert groups.layout == ("bins" if among == 16 else "tiles")
    assert groups.shape[0] * groups.shape[1] <= 4 * len(groups.tokens) + 8 * 16
    assert len(groups.slots.unique()) == len(groups.tokens)
    direction = torch.randn(120, 40, generator=torch.Generator().manual_seed(5)).bfloat16()
    assert distance(call("grouped", m), m.expected()) <= 4 * 2**-8
    actual = gradients(partial(call, "grouped"), m, direction)
    expected = gradients(reference, m.fp64(), direction.double())
    for gradient, exact in zip(actual, expected, strict=True):
        assert distance(gradient, exact) <= 4 * 2**-8


@pytest.mark.parametrize("backend", SPARSE_BACKENDS)
def test_a_broken_expert_has_no_effect_on_tokens_that_did_not_choose_it(backend):
    m = draw_mixture(40, 24, 16, (4,) * 4, 2, with_null=False)
    m.a[4:8] = 1e38  # h of the second expert is infinite
    out, chose = call(backend, m), (m.ids == 1).any(-1)
    assert chose.any()
    assert not chose.all()
    assert not torch.isfinite(out[chose]).all()
    assert distance(out[~chose], m.expected()[~chose]) <= 1e-5


@pytest.mark.parametrize("backend", SPARSE_BACKENDS)
def test_autocast_multiplies_narrow_and_leaves_the_base_dtype(backend):
    m = draw_mixture(33, 24, 16, (8,) * 4, 2)
    weights = m.weights.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = call(backend, m, weights)
    out.square().sum().backward()
    assert out.dtype == torch.float32
    assert torch.isfinite(weights.grad).all()
    # x, A, h, gated h and B are rounded to bf16, by up to 2^-8 each. The lower bound shows that they are.
    assert 1e-5 < distance(out, m.expected()) <= 5 * 2**-8


@pytest.mark.parametrize("backend", [name for name in BACKENDS if "triton" not in name])
def test_a_second_derivative_is_right_or_refused(backend):
    m = draw(7, 8, 8, (4,) * 3, 2, dtype=torch.float64, with_null=False)
    gates = m.weights[:1] if backend == "folded" else m.weights
    leaf = gates.clone().requires_grad_()
    if backend == "folded":
        dense = leaf.new_zeros(1, 3).scatter(1, m.ids[:1], leaf)
        out = mix(m.x, m.a, m.b, dense, m.ranks, m.base, backend=backend)
    else:
        out = call(backend, m, leaf)
    (gradient,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    if backend in ("stacked", "grouped"):
        with pytest.raises(PeftMoeError, match="second derivative"):
            gradient.sum().backward()
    else:
        gradient.sum().backward()
        assert leaf.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [*SPARSE_BACKENDS, "folded", "dense"])
def test_the_result_overwrites_the_base_only_without_autograd(backend, dtype):
    m = draw_mixture(9, 16, 24, (8, 8, 8), 2, with_null=False, dtype=dtype)
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
    expected = run(m.base)
    assert torch.equal(m.base, before)
    with torch.no_grad():
        written = run(m.base, overwrite=True)
    assert written.data_ptr() == m.base.data_ptr()
    assert torch.equal(written, expected)
    # Autograd may need the base's output, so the result is a new tensor.
    m.base = before.clone().requires_grad_()
    assert torch.equal(run(m.base, overwrite=True), expected)
    assert torch.equal(m.base, before)
