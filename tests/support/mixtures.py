"""Random mixtures on one layer with sparse decisions, and their exact results in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_moe.ops import RankMap, mix_reference


@dataclass
class Mixture:
    """The inputs of one call. Some ids are E, "no expert"; ``dense`` holds the same gates as [N, E]."""

    x: Tensor
    a: Tensor
    b: Tensor
    base: Tensor
    ids: Tensor
    weights: Tensor
    ranks: RankMap

    @property
    def dense(self) -> Tensor:
        return self.spread(self.weights)

    def spread(self, weights: Tensor) -> Tensor:
        experts = len(self.ranks.ranks)
        return weights.new_zeros(len(self.ids), experts + 1).scatter(1, self.ids, weights)[:, :experts]

    def fp64(self) -> Mixture:
        """Return the same numbers in float64 on the CPU."""
        tensors = (self.x, self.a, self.b, self.base)
        x, a, b, base = (t.detach().double().cpu() for t in tensors)
        return Mixture(x, a, b, base, self.ids.cpu(), self.weights.detach().double().cpu(), self.ranks)

    def expected(self, gates: Tensor | None = None) -> Tensor:
        """Return the reference output in float64, with other dense gates if they are given."""
        exact = self.fp64()
        gates = exact.dense if gates is None else gates.detach().double().cpu()
        return mix_reference(exact.x, exact.a, exact.b, gates, exact.ranks, exact.base)

    def expected_gradients(self, direction: Tensor, gates: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the float64 gradients of the input and of the chosen weights, or of the dense gates."""
        exact = self.fp64()
        leaf = (exact.weights if gates is None else gates.detach().double().cpu()).requires_grad_()
        exact.x.requires_grad_()
        dense = exact.spread(leaf) if gates is None else leaf
        out = mix_reference(exact.x, exact.a, exact.b, dense, exact.ranks, exact.base)
        dx, dgates = torch.autograd.grad(out, (exact.x, leaf), direction.double().cpu())
        return dx, dgates


def draw_mixture(
    tokens: int,
    width: int,
    out: int,
    ranks: tuple[int, ...],
    chosen: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    with_null: bool = True,
    among: int | None = None,
    seed: int = 0,
) -> Mixture:
    """Draw the inputs of a random mixture.

    Args:
        tokens, width, out, ranks, chosen: N, I, O, r_e, K.
        dtype, device: of all tensors but the ids; the gates are always float32.
        with_null: whether some ids are "no expert".
        among: if given, only the first ``among`` experts are chosen.
        seed: seed of the numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    experts, total = len(ranks), sum(ranks)
    scores = torch.randn(tokens, experts, generator=generator)
    scores[:, experts if among is None else among :] = -1e9
    weights, ids = scores.softmax(-1).topk(chosen)
    if with_null:
        absent = torch.rand(tokens, chosen, generator=generator) < 0.15
        # At most one per token, because ids are distinct.
        absent &= absent.cumsum(1) == 1
        ids, weights = ids.masked_fill(absent, experts), weights.masked_fill(absent, 0.0)
    scaling = tuple(0.5 + 0.25 * (e % 5) for e in range(experts))
    return Mixture(
        normal(tokens, width),
        normal(total, width),
        normal(total, out),
        normal(tokens, out),
        ids.to(device),
        weights.to(device),
        RankMap(ranks, scaling),
    )


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill new memory with NaN, or with integers far out of range, until something writes to it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest expected entry; infinity if one is not finite."""
    actual = actual.detach().double().cpu()
    if not bool(torch.isfinite(actual).all()):
        return float("inf")
    if expected.numel() == 0 or not bool(expected.any()):
        return float(actual.abs().max()) if actual.numel() else 0.0
    return float((actual - expected).abs().max() / expected.abs().max())
