"""Where the time of our mixture goes, operation by operation, beside that of one LoRA of the same total rank.

torch's profiler runs on the wall's clock: shares are to be read, not times, and on a busy machine
not even these.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile

from .clock import Variant
from .contestants import build
from .experts import TINY_LLAMA
from .models import GOAL, decode, prefill, training_step
from .results import OURS, TOTAL

MOST = 10
REPEATS = 3
STEPS: dict[str, Callable[..., Variant]] = {"prefill": prefill, "decode": decode, "training": training_step}


def measure(quick: bool) -> tuple[str, dict[str, str]]:
    """A table per step, of the operations that differ most in milliseconds; and its head in words."""
    case = replace(GOAL, experts=2, sizes=TINY_LLAMA, tokens=48) if quick else GOAL
    contestants, _, _ = build(case, [OURS, TOTAL])
    torch.manual_seed(2)
    ids = torch.randint(0, case.sizes["vocab_size"], (case.batch, case.tokens))
    parts, bounds = [], {}
    for step, make in STEPS.items():
        spent = {}
        for name, contestant in contestants.items():
            contestant.model.eval()
            with nullcontext() if step == "training" else torch.no_grad():
                spent[name] = _operations(make(contestant, ids))
        ours, lora = spent[OURS], spent[TOTAL]
        more = {op: ours.get(op, 0.0) - lora.get(op, 0.0) for op in {*ours, *lora}}
        chosen = sorted(more, key=lambda op: -abs(more[op]))[:MOST]
        dear = [op for op in chosen if more[op] > 0][:4]
        bounds[step] = ", ".join(f"{op.removeprefix('aten::')} {more[op]:+.1f}" for op in dear)
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
    """Milliseconds per run of every operation, without those that it calls."""
    spent: dict[str, float] = {}
    for number in range(REPEATS + 1):
        if variant.before is not None:
            variant.before()
        with profile(activities=[ProfilerActivity.CPU]) as found:
            variant.run()
        if number:  # the first warms up
            for event in found.key_averages():
                spent[event.key] = spent.get(event.key, 0.0) + event.self_cpu_time_total / 1e3 / REPEATS
    return spent
