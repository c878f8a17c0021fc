"""The time of each operation in our mixture, beside that in one LoRA of the same total rank.

torch's profiler uses wall-clock time: read the shares, not the times, and on a busy machine read neither.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile

from .clock import Variant
from .experts import TINY_LLAMA
from .methods import build
from .models import GOAL, decode, prefill, training_step
from .results import OURS, TOTAL

MOST = 10
REPEATS = 3
STEPS: dict[str, Callable[..., Variant]] = {"prefill": prefill, "decode": decode, "training": training_step}


def measure(quick: bool) -> tuple[str, dict[str, str]]:
    """Return a table per step of the operations that differ most, and per step the slowest ones in words."""
    case = replace(GOAL, experts=2, sizes=TINY_LLAMA, tokens=48) if quick else GOAL
    methods, _, _ = build(case, [OURS, TOTAL])
    torch.manual_seed(2)
    ids = torch.randint(0, case.sizes["vocab_size"], (case.batch, case.tokens))
    parts, bounds = [], {}
    for step, make in STEPS.items():
        spent = {}
        for name, method in methods.items():
            method.model.eval()
            with nullcontext() if step == "training" else torch.no_grad():
                spent[name] = _operations(make(method, ids))
        ours, lora = spent[OURS], spent[TOTAL]
        more = {op: ours.get(op, 0.0) - lora.get(op, 0.0) for op in {*ours, *lora}}
        chosen = sorted(more, key=lambda op: -abs(more[op]))[:MOST]
        slower = [op for op in chosen if more[op] > 0][:4]
        bounds[step] = ", ".join(f"{op.removeprefix('aten::')} {more[op]:+.1f}" for op in slower)
        lines = [
            f"| {op} | {ours.get(op, 0):.2f} | {lora.get(op, 0):.2f} | {more[op]:+.2f} |" for op in chosen
        ]
        total = f"| all | {sum(ours.values()):.1f} | {sum(lora.values()):.1f} | {sum(more.values()):+.1f} |"
        head = [
            f"### Where the time goes, ms: {step}, {case}",
            "",
            f"| operation | {OURS} | {TOTAL} | more |",
        ]
        parts.append("\n".join([*head, "|---|---:|---:|---:|", *lines, total]))
    return "\n\n".join(parts), bounds


def _operations(variant: Variant) -> dict[str, float]:
    """Return the milliseconds per run of each operation, without the operations that it calls."""
    spent: dict[str, float] = {}
    for number in range(REPEATS + 1):
        if variant.before is not None:
            variant.before()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            variant.run()
        if number:  # the first run warms up
            for event in profiler.key_averages():
                spent[event.key] = spent.get(event.key, 0.0) + event.self_cpu_time_total / 1e3 / REPEATS
    return spent
