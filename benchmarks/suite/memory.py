"""Level "memory": one training step in a fresh process, for each method.

    python -m benchmarks.suite.memory "ours" --experts 16 --rank 8        # prints one JSON object

"Allocated" is the peak of the step's bytes from torch's allocator, counted call by call. It is the same in
every run, and it excludes the memory of oneDNN and MKL. "Resident" is the rise of the process's resident set
during the step, by the kernel's high-water mark. It varies by ±15 MiB, because the C library reuses memory
differently. "Saved" is the number of bytes that autograd keeps between forward and backward, each storage
once, without weights.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from .experts import TINY_LLAMA, Case
from .machine import in_fresh_process
from .methods import build
from .models import FULL, training_step
from .parity import check
from .results import Row

NAMES = (
    "base",
    "LoRA r",
    "LoRA k·r",
    "LoRA E·r",
    "PEFT X-LoRA",
    "mergoo",
    "ours",
    "ours, router per block",
    "ours, reference",
)


def measure(quick: bool, say: Callable[[str], None]) -> Iterator[Row]:
    """Yield one row per method, each from a fresh process."""
    case = replace(FULL, experts=4, sizes=TINY_LLAMA, tokens=48) if quick else FULL
    for name in NAMES[-3:-1] if quick else NAMES:
        words = [
            name,
            "--experts",
            str(case.experts),
            "--rank",
            str(case.rank),
            *(["--tiny"] if quick else []),
        ]
        figures = in_fresh_process("benchmarks.suite.memory", words)
        if "missing" in figures:
            say(f"{name} is left out: {figures['missing']}")
            continue
        yield Row("memory", "training step", case, name, extra=figures)
        say(f"memory: {name}")


def step_memory(name: str, case: Case) -> dict[str, object]:
    """Return the peak and the saved bytes of one step, after a warm-up step."""
    methods, missing, experts = build(case, [name])
    if name not in methods:
        return {"missing": missing.get(name, "no method has this name")}
    method = methods[name]
    torch.manual_seed(2)
    ids = torch.randint(0, case.sizes["vocab_size"], (case.batch, case.tokens))
    check(name, method, experts, ids[:, :16])
    step = training_step(method, ids)
    step.run()
    saved = _saved_bytes(method.model, step.run)
    allocated = allocated_peak(step.run)
    before = reset_peak()
    step.run()
    return {
        "saved_mib": saved / 2**20,
        "saved_bytes_per_token_and_layer": saved / ids.numel() / len(experts.names),
        "allocated_mib": allocated / 2**20,
        "resident_mib": (status("VmHWM") - before) / 2**20,
    }


def _saved_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(saved.values())


def allocated_peak(run: Callable[[], object]) -> int:
    """Return the peak of bytes in use that torch's CPU allocator gave out during ``run``."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]
    calls = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    assert calls, "the profiler saw no allocation"
    return max(accumulate(size for _, size in calls))


def reset_peak() -> int:
    # Freed memory goes back to the system first; else the step would reuse it and the peak would not rise.
    gc.collect()
    with suppress(AttributeError):  # other C libraries than glibc have no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to the present size
    return status("VmRSS")


def status(word: str) -> int:
    match = re.search(rf"{word}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None, word
    return 1024 * int(match[1])


def main() -> None:
    """Measure one method in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="name of the method")
    parser.add_argument("--experts", type=int, default=FULL.experts)
    parser.add_argument("--rank", type=int, default=FULL.rank)
    parser.add_argument("--tiny", action="store_true", help="a model of one small layer")
    args = parser.parse_args()
    torch.set_num_threads(1)
    case = replace(FULL, experts=args.experts, rank=args.rank)
    if args.tiny:
        case = replace(case, sizes=TINY_LLAMA, tokens=48)
    print(json.dumps(step_memory(args.name, case)))


if __name__ == "__main__":
    main()
