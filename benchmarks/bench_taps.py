"""What the ways to read a tap cost: prefill and decoding, as ratios to the gate-less mixture.

    python benchmarks/bench_taps.py                 # about two minutes on two cores

A 30-million-parameter Llama with random weights, eight experts of rank 8 on all linears, 2 × 256 tokens;
interleaved rounds, medians with the spread of the middle half. Floor of a probe: tap/layers of a bare pass.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_moe import MoLoraConfig

RESULTS = Path(__file__).parent / "results"
SIZES = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
EXPERTS = {"experts": 8, "r": 8, "target_modules": "all-linear", "init_weights": False}
PROMPT = {"router": "context", "null_expert": True}
TOKEN = {**PROMPT, "router_granularity": "token"}
METHODS: dict[str, dict[str, Any] | None] = {
    "bare base": None,
    "gate-less": {"router": "uniform"},
    "linear, per module": {"router": "linear"},
    "per prompt, probe (tap 4 of 8)": PROMPT,
    "per prompt, base": {**PROMPT, "router_below_tap": "base"},
    "per token, probe": TOKEN,
    "per token, prompt below": {**TOKEN, "router_below_tap": "prompt"},
    "per token, base": {**TOKEN, "router_below_tap": "base"},
    "running, probe (tap 4 of 8)": {"router": "running"},
    "running, base": {"router": "running", "router_below_tap": "base"},
}


def build(fields: dict[str, Any] | None) -> Any:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    if fields is None:
        return base
    return get_peft_model(base, MoLoraConfig(task_type="CAUSAL_LM", **EXPERTS, **fields)).eval()


def prefill(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        model(input_ids=ids, use_cache=True)

    return run


def decode(model: Any, ids: torch.Tensor, steps: int) -> Callable[[], None]:
    def run() -> None:
        cache = model(input_ids=ids[:, :32], use_cache=True).past_key_values
        start.append(time.perf_counter())
        for step in range(steps):
            model(input_ids=ids[:, 32 + step : 33 + step], past_key_values=cache, use_cache=True)

    start: list[float] = []
    run.start = start  # type: ignore[attr-defined]  # decoding alone is timed
    return run


def seconds(run: Any) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - (run.start[-1] if hasattr(run, "start") else begin)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=24)
    args = parser.parse_args()
    ids = torch.randint(3, SIZES["vocab_size"], (2, 256))
    models = {name: build(fields) for name, fields in METHODS.items()}
    kinds = {"prefill": prefill, "decode": lambda m, i: decode(m, i, args.steps)}
    taken: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in kinds} for name in models}
    with torch.no_grad():
        for number in range(args.rounds + 1):
            for name, model in models.items():
                for kind, make in kinds.items():
                    value = seconds(make(model, ids))
                    if number:  # the first round warms up
                        taken[name][kind].append(value)
    threads = torch.get_num_threads()
    lines = [
        "# Taps: prefill and decoding, as ratios to the gate-less mixture",
        "",
        f"`python benchmarks/bench_taps.py`; medians of {args.rounds} rounds (middle half); torch "
        f"{torch.__version__}, {threads} threads, {platform.machine()}; 30M Llama, 8 experts of rank 8.",
        "",
        "| method | prefill | decode |",
        "|---|---:|---:|",
    ]
    for name in models:
        cells = []
        for kind in kinds:
            ratios = [a / b for a, b in zip(taken[name][kind], taken["gate-less"][kind], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells.append(f"{middle:.2f} ({low:.2f}–{high:.2f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    print(text)
    path = RESULTS / f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}-taps.md"
    path.write_text(text, encoding="utf-8")
    print(f"Kept in {path}.")


if __name__ == "__main__":
    main()
