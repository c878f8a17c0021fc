"""Level "layer": one linear layer of the base, for several numbers of experts, ranks and choices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from .clock import Variant, interleave
from .experts import DTYPE, Case
from .floors import floor
from .machine import Peaks
from .methods import Method, build
from .parity import admit
from .results import Row, make_rows

SIDE = Case(width=1024, out=1024)
WIDE = Case(width=2048, out=5504, rank=16)
EXPERTS = (2, 4, 8, 16, 32, 64, 128)
RANKS = (4, 8, 16, 32, 64)


def cases(quick: bool) -> Iterator[Case]:
    """Yield E × r at top-2; top-1 and dense over E at r=16; a wide layer; and single tokens."""
    if quick:
        small = replace(SIDE, width=64, out=96, tokens=16)
        yield from (replace(small, experts=2, rank=4), replace(small, experts=8, top_k=None))
        return
    yield from (replace(SIDE, experts=E, rank=r) for E in EXPERTS for r in RANKS)
    yield from (replace(SIDE, experts=E, rank=16, top_k=k) for k in (1, None) for E in EXPERTS)
    yield from (replace(WIDE, experts=E) for E in (8, 32))
    yield from (replace(SIDE, experts=E, rank=16, batch=1, tokens=1) for E in (8, 32, 128))


def measure(peaks: Peaks, quick: bool, say: Callable[[str], None]) -> Iterator[Row]:
    """Measure each case forward, and forward and backward where only the router trains."""
    for case in cases(quick):
        methods, missing, experts = build(case)
        torch.manual_seed(2)
        x_BTI = torch.randn(case.batch, case.tokens, case.width or 0).to(DTYPE)
        methods = admit(methods, experts, x_BTI, missing)
        for name, reason in missing.items():
            say(f"{name} is left out: {reason}")
        one_token = case.batch * case.tokens == 1
        for step, passes in (("forward", 1), ("router training", 2)):
            if one_token and passes == 2:
                continue
            variants = {name: _variant(c, x_BTI, passes) for name, c in methods.items()}
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
                methods,
                lambda name, c=case, p=passes: floor(c, name, peaks, passes=p),
            )
        say(f"layer: {case}")


def _variant(method: Method, x_BTI: Tensor, passes: int) -> Variant:
    if passes == 1:
        return Variant(lambda: method.model(x_BTI))
    # A single LoRA is frozen here like the experts: its backward pass goes to the input only.
    trains = method.trains if method.mixes else []
    for parameter in method.model.parameters():
        parameter.requires_grad_(any(parameter is p for p in trains))
    leaf = x_BTI.clone().requires_grad_()
    with torch.no_grad():
        gradient = torch.randn_like(method.model(x_BTI))

    def run() -> None:
        method.model(leaf).backward(gradient)
        leaf.grad = None
        for parameter in trains:
            parameter.grad = None

    return Variant(run)
