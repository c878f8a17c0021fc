"""Mixtures on one layer with sparse decisions, and what the loop in float64 makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_moe.ops import RankMap, mix_reference


@dataclass
class Mixture:
    """MixInputs of one call. Ids hold E, "no expert", in places; ``dense`` are the same gates, [N, E]."""

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

    def wide(self) -> Mixture:
        """The same numbers in float64 on the CPU."""
        tensors = (self.x, self.a, self.b, self.base)
        x, a, b, base = (t.detach().double().cpu() for t in tensors)
        return Mixture(x, a, b, base, self.ids.cpu(), self.weights.detach().double().cpu(), self.ranks)

    def wanted(self, gates: Tensor | None = None) -> Tensor:
        """The output in float64, by the loop; of dense gates where they are given."""
        own = self.wide()
        gates = own.dense if gates is None else gates.detach().double().cpu()
        return mix_reference(own.x, own.a, own.b, gates, own.ranks, own.base)

    def wanted_gradients(self, direction: Tensor, gates: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Of the input, and of the chosen weights (or of the dense gates), in float64."""
        own = self.wide()
        leaf = (own.weights if gates is None else gates.detach().double().cpu()).requires_grad_()
        own.x.requires_grad_()
        dense = own.spread(leaf) if gates is None else leaf
        out = mix_reference(own.x, own.a, own.b, dense, own.ranks, own.base)
        dx, dgates = torch.autograd.grad(out, (own.x, leaf), direction.double().cpu())
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
    none: bool = True,
    among: int | None = None,
    seed: int = 0,
) -> Mixture:
    """Random operands.

    Args:
        tokens, width, out, ranks, chosen: N, I, O, r_e, K.
        dtype, device: of all but the ids; the gates are float32 in any case.
        none: some places choose no expert.
        among: only the first so many experts are ever chosen.
        seed: of the numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    experts, total = len(ranks), sum(ranks)
    scores = torch.randn(tokens, experts, generator=generator)
    scores[:, experts if among is None else among :] = -1e9
    weights, ids = scores.softmax(-1).topk(chosen)
    if none:
        absent = torch.rand(tokens, chosen, generator=generator) < 0.15
        # One place per token at most: ids are distinct.
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
    """New memory holds NaN, and integers that are far out of range, until something writes to it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def distance(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest entry that is wanted; NaN and infinity are far away."""
    found = found.detach().double().cpu()
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    if wanted.numel() == 0 or not bool(wanted.any()):
        return float(found.abs().max()) if found.numel() else 0.0
    return float((found - wanted).abs().max() / wanted.abs().max())
