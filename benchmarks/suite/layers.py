"""Level "layer": one linear layer of the base, over numbers of experts, ranks and choices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from .clock import Variant, interleave
from .contestants import Contestant, build
from .experts import DTYPE, Case
from .floors import floor
from .machine import Peaks
from .parity import admit
from .results import Row, make_rows

SIDE = Case(width=1024, out=1024)
WIDE = Case(width=2048, out=5504, rank=16)
EXPERTS = (2, 4, 8, 16, 32, 64, 128)
RANKS = (4, 8, 16, 32, 64)


def cases(quick: bool) -> Iterator[Case]:
    """E × r at top-2; top-1 and dense over E at r=16; a wide layer; and one token at a time."""
    if quick:
        small = replace(SIDE, width=64, out=96, tokens=16)
        yield from (replace(small, experts=2, rank=4), replace(small, experts=8, top_k=None))
        return
    yield from (replace(SIDE, experts=E, rank=r) for E in EXPERTS for r in RANKS)
    yield from (replace(SIDE, experts=E, rank=16, top_k=k) for k in (1, None) for E in EXPERTS)
    yield from (replace(WIDE, experts=E) for E in (8, 32))
    yield from (replace(SIDE, experts=E, rank=16, batch=1, tokens=1) for E in (8, 32, 128))


def measure(peaks: Peaks, quick: bool, say: Callable[[str], None]) -> Iterator[Row]:
    """Forward of every case, and forward and backward with the router alone in training."""
    for case in cases(quick):
        contestants, missing, experts = build(case)
        torch.manual_seed(2)
        x_BTI = torch.randn(case.batch, case.tokens, case.width or 0).to(DTYPE)
        contestants = admit(contestants, experts, x_BTI, missing)
        for name, reason in missing.items():
            say(f"{name} is left out: {reason}")
        one_token = case.batch * case.tokens == 1
        for step, passes in (("forward", 1), ("router training", 2)):
            if one_token and passes == 2:
                continue
            variants = {name: _variant(c, x_BTI, passes) for name, c in contestants.items()}
            with torch.no_grad() if passes == 1 else nullcontext():
                times = interleave(
                    variants,
                    budget=0.1 if quick else 1.5,
                    fewest=3 if quick else 5,
                    inner=20 if one_token else 1,
                )
            yield from make_rows(
                "layer",
                step,
                case,
                times,
                contestants,
                lambda name, c=case, p=passes: floor(c, name, peaks, passes=p),
            )
        say(f"layer: {case}")


def _variant(contestant: Contestant, x_BTI: Tensor, passes: int) -> Variant:
    if passes == 1:
        return Variant(lambda: contestant.model(x_BTI))
    # A single LoRA is frozen here as the experts are: only the way to the input counts.
    trains = contestant.trains if contestant.mixes else []
    for parameter in contestant.model.parameters():
        parameter.requires_grad_(any(parameter is p for p in trains))
    leaf = x_BTI.clone().requires_grad_()
    with torch.no_grad():
        gradient = torch.randn_like(contestant.model(x_BTI))

    def run() -> None:
        contestant.model(leaf).backward(gradient)
        leaf.grad = None
        for parameter in trains:
            parameter.grad = None

    return Variant(run)
