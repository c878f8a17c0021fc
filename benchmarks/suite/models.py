"""Levels "prefill", "decode" and "training" of a whole model, and prefill for growing numbers of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .clock import Variant, interleave
from .experts import TINY_LLAMA, Case
from .floors import floor
from .machine import Peaks
from .methods import GATHER, Method, build
from .parity import admit
from .results import Row, make_rows

FULL = Case(experts=16, rank=8)
# The shape of the goals that compare with one LoRA of the same total rank.
GOAL = Case(experts=8, rank=16)
GROWTH = (2, 8, 32, 128)
OWN_BACKENDS = ("ours, stacked", "ours, grouped", "ours, gather")
PROMPT, STEPS = 32, 8
# With more experts, a pass of the dense peers takes tens of seconds.
DENSE_PEERS_UP_TO = 32


def measure(peaks: Peaks, quick: bool, say: Callable[[str], None]) -> Iterator[Row]:
    """Yield the rows of every case and level."""
    if quick:
        case = replace(FULL, experts=4, sizes=TINY_LLAMA, tokens=48)
        yield from _case(case, None, ["prefill", "decode", "training"], peaks, say, budget=0.2, fewest=3)
        return
    few = ["base", "LoRA k·r", "LoRA E·r", "ours", "ours, router per block", *OWN_BACKENDS]
    inference = ["prefill", "decode"]
    yield from _case(FULL, None, inference, peaks, say, budget=30, fewest=5)
    yield from _case(GOAL, few, inference, peaks, say, budget=15, fewest=7)
    for count in GROWTH:
        peers = ["mergoo", *(["PEFT X-LoRA", "PEFT Arrow"] if count <= DENSE_PEERS_UP_TO else [])]
        case = replace(GOAL, experts=count)
        names = [*few[:4], *peers]
        yield from _case(case, names, ["prefill"], peaks, say, budget=12, fewest=4, prefix="growth, ")
    # Training comes last, because it fragments the process's memory and slows down any decoding after it. A
    # token of the base then took 6.8 to 7.3 ms instead of 6.3, and our mixture added 1.27 to 1.40 × as much
    # as a LoRA instead of 1.18 ×.
    yield from _case(FULL, None, ["training"], peaks, say, budget=30, fewest=5)
    yield from _case(GOAL, few, ["training"], peaks, say, budget=15, fewest=7)


def _case(
    case: Case,
    names: list[str] | None,
    levels: list[str],
    peaks: Peaks,
    say: Callable[[str], None],
    *,
    budget: float,
    fewest: int,
    prefix: str = "",
) -> Iterator[Row]:
    methods, missing, experts = build(case, names)
    torch.manual_seed(2)
    ids = torch.randint(0, case.sizes["vocab_size"], (case.batch, case.tokens))
    methods = admit(methods, experts, ids[:, :16], missing)
    for name, reason in missing.items():
        say(f"{name} is left out: {reason}")
    for level in levels:
        training, decoding = level == "training", level == "decode"
        takes_part = {name: c for name, c in methods.items() if _has_step(name, c, level)}
        make = {"prefill": prefill, "decode": decode, "training": training_step}[level]
        with nullcontext() if training else torch.no_grad():
            times = interleave({n: make(c, ids) for n, c in takes_part.items()}, budget=budget, fewest=fewest)
        if decoding:
            times = {name: [value / STEPS for value in values] for name, values in times.items()}
        passes = 2 if training else 1
        yield from make_rows(
            f"{prefix}{level}",
            "token" if decoding else "step",
            case,
            times,
            takes_part,
            lambda name, p=passes, d=decoding: floor(case, name, peaks, passes=p, decoding=d),
        )
        say(f"{prefix}{level}: {case}")


def _has_step(name: str, method: Method, level: str) -> bool:
    if name == f"ours, {GATHER}":  # it serves few tokens at a time
        return level == "decode"
    # Arrow has nothing to train; the base shows the cost of a backward pass to the embeddings.
    return level != "training" or bool(method.trains) or name == "base"


def prefill(method: Method, ids: Tensor) -> Variant:
    """Process a batch of prompts at once, with a new cache if the method has one."""
    return Variant(lambda: method.model(input_ids=ids, use_cache=method.caches))


def decode(method: Method, ids: Tensor) -> Variant:
    """Decode one sequence after a short prompt; without a cache each step processes all tokens again."""
    model, row = method.model, ids[:1]
    if not method.caches:

        def reread() -> None:
            for end in range(PROMPT + 1, PROMPT + STEPS + 1):
                model(input_ids=row[:, :end], use_cache=False, logits_to_keep=1)

        return Variant(reread)
    state: dict[str, Any] = {}

    def before() -> None:
        state["cache"] = model(input_ids=row[:, :PROMPT], use_cache=True).past_key_values

    def run() -> None:
        for step in range(PROMPT, PROMPT + STEPS):
            model(input_ids=row[:, step : step + 1], past_key_values=state["cache"], use_cache=True)

    return Variant(run, before)


def training_step(method: Method, ids: Tensor) -> Variant:
    """Run forward and backward without an optimiser; only routers train, or the factors of a LoRA."""
    model = method.model.train()
    if not method.trains:
        embeddings: nn.Module = model.get_input_embeddings()
        embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    for parameter in method.trains:
        parameter.requires_grad_(True)

    def run() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for parameter in method.trains:
            parameter.grad = None

    return Variant(run)
