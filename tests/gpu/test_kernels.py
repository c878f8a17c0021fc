"""The backends on a GPU against the loop in float64: output, gradients, no wait for the host, CUDA graphs."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from support.mixtures import Mixture, distance, draw_mixture, poisoned

from peft_moe.ops import BACKENDS, call_spec_of, choose, mix
from peft_moe.ops.backend import MixInputs

# float32 sums of 384 products; bf16 and fp16 round h, the partial sums and y: 2^-9 and 2^-12 each, 4 times.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DTYPES = [pytest.param(t, id=str(t)[6:]) for t in BOUNDS]
TRITON = ["triton_stacked", "triton_sorted", "triton_gather"]
# (tokens, in, out, ranks, chosen)
SHAPES = [
    pytest.param(300, 256, 384, (16,) * 8, 2, id="equal"),
    pytest.param(129, 100, 203, (8,) * 5, 3, id="odd"),
    pytest.param(1, 256, 384, (16,) * 8, 2, id="one-token"),
    pytest.param(700, 128, 128, (16,) * 128, 2, id="many-experts"),
    pytest.param(65, 256, 128, (64,) * 4, 4, id="wide-ranks"),
    pytest.param(65, 256, 128, (64, 0, 5, 16), 2, id="unequal"),
]


def call(m: Mixture, backend: str | None, **changes):
    tensors = {"x": m.x, "weights": m.weights, "base": m.base, **changes}
    sparse = {"expert_ids_NK": m.ids, "weights_NK": tensors["weights"]}
    gates = m.spread(tensors["weights"])
    return mix(tensors["x"], m.a, m.b, gates, m.ranks, tensors["base"], backend=backend, **sparse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "out", "ranks", "chosen"), SHAPES)
@pytest.mark.parametrize("backend", [*TRITON, "stacked", "grouped"])
def test_forward(backend, tokens, width, out, ranks, chosen, dtype):
    m = draw_mixture(tokens, width, out, ranks, chosen, dtype=dtype, device="cuda")
    if backend == "triton_gather" and tokens > 64:
        m = draw_mixture(16, width, out, ranks, chosen, dtype=dtype, device="cuda")
    skip_unless_served(m, backend)
    with torch.no_grad(), poisoned():
        assert distance(call(m, backend), m.expected()) <= BOUNDS[dtype]


def skip_unless_served(m: Mixture, backend: str, trains: bool = False) -> None:
    if backend not in BACKENDS:
        pytest.skip("this backend does not exist yet")
    weights = m.weights.clone().requires_grad_(trains)
    spec = call_spec_of(MixInputs(m.x, m.a, m.b, m.dense, m.ranks, m.base, m.ids, weights))
    reason = choose(spec).refused.get(backend)
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "out", "ranks", "chosen"), SHAPES)
@pytest.mark.parametrize("backend", ["triton_stacked", "triton_sorted", "stacked", "grouped"])
def test_gradients(backend, tokens, width, out, ranks, chosen, dtype):
    m = draw_mixture(tokens, width, out, ranks, chosen, dtype=dtype, device="cuda")
    skip_unless_served(m, backend, trains=True)
    leaves = {"x": m.x, "weights": m.weights, "base": m.base}
    leaves = {name: t.clone().requires_grad_() for name, t in leaves.items()}
    direction = torch.randn(tokens, out, device="cuda").to(dtype)
    with poisoned():
        gradients = torch.autograd.grad(call(m, backend, **leaves), list(leaves.values()), direction)
    expected_dx, expected_dw = m.expected_gradients(direction)
    assert distance(gradients[0], expected_dx) <= BOUNDS[dtype]
    absent = m.ids.cpu() == len(ranks)
    assert distance(gradients[1], expected_dw.masked_fill(absent, 0.0)) <= BOUNDS[dtype]
    assert torch.equal(gradients[2], direction)


@pytest.mark.parametrize("rows", [200, 1])
def test_dense_gates(rows):
    m = draw_mixture(200, 256, 128, (16,) * 8, 1, dtype=torch.bfloat16, device="cuda")
    gates = torch.randn(rows, 8, device="cuda", requires_grad=True)
    x = m.x.clone().requires_grad_()
    out = mix(x, m.a, m.b, gates, m.ranks, m.base, backend="triton_stacked")
    assert distance(out, m.expected(gates)) <= BOUNDS[torch.bfloat16]
    direction = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (x, gates), direction)
    for gradient, exact in zip(gradients, m.expected_gradients(direction, gates), strict=True):
        assert distance(gradient, exact) <= BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("backend", TRITON)
def test_a_token_gets_the_same_bits_in_any_batch(backend):
    m = draw_mixture(48, 256, 384, (16,) * 8, 2, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        out = call(m, backend)
        assert torch.equal(call(m, backend), out)
        order = torch.randperm(48, device="cuda")
        m.x, m.base, m.ids, m.weights = (t[order] for t in (m.x, m.base, m.ids, m.weights))
        assert torch.equal(call(m, backend), out[order])


@pytest.mark.parametrize("backend", [None, *TRITON, "stacked", "gather"])
@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_forward_never_waits_for_the_device(backend, tokens):
    m = draw_mixture(tokens, 256, 384, (16,) * 8, 2, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        call(m, backend)  # tables of the rank axis are copied once
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call(m, backend)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["triton_stacked", "triton_sorted", "stacked"])
def test_a_training_step_never_waits_for_the_device(backend):
    m = draw_mixture(512, 256, 384, (16,) * 8, 2, dtype=torch.bfloat16, device="cuda")
    weights = m.weights.clone().requires_grad_()
    for debug in ("default", "error"):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(debug)
        try:
            call(m, backend, weights=weights).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", [None, *TRITON, "stacked", "gather"])
def test_a_decode_step_in_a_cuda_graph_follows_new_choices(backend):
    m = draw_mixture(4, 256, 384, (16,) * 8, 2, dtype=torch.bfloat16, device="cuda")
    side = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):
            call(m, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = call(m, backend)
    other = draw_mixture(4, 256, 384, (16,) * 8, 2, dtype=torch.bfloat16, device="cuda", seed=9)
    for name in ("x", "base", "ids", "weights"):
        getattr(m, name).copy_(getattr(other, name))
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(m.ids.cpu(), draw_mixture(4, 256, 384, (16,) * 8, 2).ids)
    assert distance(out, m.expected()) <= BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("sizes", [(0, 24, 0, 8), (32, 0, 0, 0), (0, 0, 0, 32), (8, 8, 8, 8)])
def test_torch_grouped_product_with_empty_groups(sizes):
    """The grouped backend relies on this: groups without a row, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 64, generator=generator).cuda().bfloat16().requires_grad_()
    w = torch.randn(4, 64, 48, generator=generator).cuda().bfloat16().requires_grad_()
    ends = torch.tensor(sizes, device="cuda").cumsum(0).to(torch.int32)
    direction = torch.randn(32, 48, generator=generator).cuda().bfloat16()
    out = torch._grouped_mm(x, w, offs=ends)
    dx, dw = torch.autograd.grad(out, (x, w), direction)
    starts = [0, *ends.tolist()]
    fp64_x, fp64_w, fp64_d = (t.detach().double().cpu() for t in (x, w, direction))
    parts = [slice(a, b) for a, b in pairwise(starts)]
    expected = torch.cat([fp64_x[p] @ fp64_w[g] for g, p in enumerate(parts)])
    assert distance(out, expected) <= 4e-3
    assert distance(dx, torch.cat([fp64_d[p] @ fp64_w[g].T for g, p in enumerate(parts)])) <= 4e-3
    assert distance(dw, torch.stack([fp64_x[p].T @ fp64_d[p] for p in parts])) <= 4e-3
