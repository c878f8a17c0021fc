"""Fit the cost model's constants to this device, in bf16 and float32, for frozen experts and top-2.

    python benchmarks/calibrate.py            # prints them; under a minute of one core
    python benchmarks/calibrate.py --write    # also writes them to peft_moe/ops/devices.json

Backends are timed as they run in a model: after their base layer, with a new routing in every call, some even
and some uneven. Peak rates come from a large product and a copy. Non-negative least squares then split the
time beyond the arithmetic among the constants. The clock is the CPU time of one thread on a CPU, and CUDA
events on a GPU. On a GPU Triton's kernels are timed as well, and kept if they were the fastest at every size
from some number of tokens on. (The GPU part has not run on a GPU yet.)
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peft_moe.ops import BACKENDS, CallSpec, MixInputs, RankMap, call_spec_of
from peft_moe.ops.backend import NEVER_CHEAPEST
from peft_moe.ops.device_costs import DEVICES, Constants, Kernel, constants_for

K = 2
ROUTINGS = 4
FITTED = ("stacked", "grouped")
KERNELS = ("triton_stacked", "triton_sorted", "triton_gather")


@dataclass(frozen=True)
class Shape:
    """Tokens, input and output width, number of experts and rank of each."""

    tokens: int
    width: int
    out: int
    experts: int
    rank: int


CPU = [
    *(Shape(512, 512, 512, e, 16) for e in (4, 8, 16, 32, 128)),
    *(Shape(512, 512, 1376, e, 16) for e in (8, 32, 128)),
    *(Shape(512, 1024, 1024, e, r) for e, r in ((8, 16), (4, 64), (32, 16), (128, 8), (64, 32))),
    Shape(128, 1024, 1024, 32, 16),
    Shape(2048, 512, 1376, 32, 16),
    *(Shape(t, 1024, 1024, e, 16) for t in (1, 16) for e in (8, 32)),
]
CUDA = [
    *(Shape(t, 4096, 4096, e, 16) for t in (512, 2048, 4096, 16384) for e in (8, 32, 128)),
    *(Shape(4096, 4096, 14336, e, 16) for e in (8, 128)),
    *(Shape(t, 4096, 4096, e, 16) for t in (1, 16) for e in (8, 128)),
]


class Timed:
    """One layer with its experts and several routings."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str) -> None:
        self.shape = s = shape
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(device, dtype)

        self.x, self.W = normal(s.tokens, s.width), normal(s.out, s.width) * s.width**-0.5
        self.A, self.B = (
            normal(s.experts * s.rank, s.width) * s.width**-0.5,
            normal(s.experts * s.rank, s.out),
        )
        self.ranks = RankMap((s.rank,) * s.experts, (1.0,) * s.experts)
        self.choices = []
        for number in range(ROUTINGS):
            bias = number * torch.randn(s.experts, generator=generator) / 2
            weights, ids = (torch.randn(s.tokens, s.experts, generator=generator) + bias).topk(K)
            self.choices.append((ids.to(device), weights.softmax(-1).to(device)))
        self.call = 0

    def inputs(self) -> MixInputs:
        self.call += 1
        ids, weights = self.choices[self.call % ROUTINGS]
        base = functional.linear(self.x, self.W)
        return MixInputs(self.x, self.A, self.B, weights, self.ranks, base, ids, weights, False)

    def seconds(self, names: list[str], clock: Callable[[Callable[[], object]], float]) -> dict[str, float]:
        """Return the median seconds that each backend adds to the base layer of the same round."""
        runs: dict[str, Callable[[], object]] = {"base": self.inputs}
        runs |= {name: lambda f=BACKENDS[name]: f.mix(self.inputs()) for name in names}
        for run in runs.values():
            for _ in range(ROUTINGS):
                run()
        rounds = [{name: clock(run) for name, run in runs.items()} for _ in range(3 * ROUTINGS)]
        return {n: max(statistics.median(r[n] - r["base"] for r in rounds), 1e-7) for n in names}


def cpu_clock(run: Callable[[], object]) -> float:
    start = time.thread_time()
    run()
    return time.thread_time() - start


def cuda_clock(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e-3


def peaks(
    dtype: torch.dtype, device: str, clock: Callable[[Callable[[], object]], float]
) -> tuple[float, float]:
    """Measure FLOPs and bytes per second: the best of several large products and copies."""
    size = 1024 if device == "cpu" else 8192
    left, right = (torch.randn(size, size).to(device, dtype) for _ in range(2))
    source = torch.ones(2**27 if device == "cpu" else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    for run in (lambda: left @ right, lambda: target.copy_(source)):
        run()
    product = min(clock(lambda: left @ right) for _ in range(7))
    copied = min(clock(lambda: target.copy_(source)) for _ in range(7))
    return 2 * size**3 / product, 2 * len(source) / copied


def terms(name: str, spec: CallSpec, known: Constants) -> list[float]:
    """Return a backend's predicted seconds without the fitted constants, and per unit of each of them."""
    none = replace(
        known, passes=0.0, per_rank=0.0, launch=0.0, segment=0.0, sort=0.0, weight_bandwidth=1e30, kernels={}
    )
    bare = BACKENDS[name].cost(spec, none)
    unit = {"passes": 1.0, "per_rank": 1e-9, "launch": 1e-6, "segment": 1e-6, "sort": 1e-6}
    per_unit = [
        (BACKENDS[name].cost(spec, replace(none, **{key: unit[key]})) - bare) / unit[key]
        for key in PARTS[name]
        if key != "weight_bandwidth"
    ]
    if "weight_bandwidth" in PARTS[name]:
        per_unit.append((BACKENDS[name].cost(spec, replace(none, weight_bandwidth=1e9)) - bare) * 1e9)
    return [bare, *per_unit]


PARTS = {"stacked": ["per_rank", "launch"], "grouped": ["passes", "segment", "sort", "weight_bandwidth"]}


def fit(name: str, cases: list[tuple[object, dict[str, float]]], known: Constants) -> Constants:
    """Fit a backend's constants by least squares of relative errors; a negative constant becomes zero."""
    rows, targets = [], []
    for spec, seconds in cases:
        bare, *parts = terms(name, spec, known)
        rows.append([part / seconds[name] for part in parts])
        targets.append((seconds[name] - bare) / seconds[name])
    free = list(range(len(PARTS[name])))
    values = [0.0] * len(free)
    table, right = torch.tensor(rows, dtype=torch.float64), torch.tensor(targets, dtype=torch.float64)
    while free:
        # Columns differ by many orders of magnitude; unscaled, least squares would drop the small ones.
        scale = table[:, free].norm(dim=0).clamp_min(1e-300)
        solution = torch.linalg.lstsq(table[:, free] / scale, right[:, None]).solution[:, 0] / scale
        if (solution >= 0).all():
            values = [float(solution[free.index(i)]) if i in free else 0.0 for i in range(len(values))]
            break
        free.pop(int(solution.argmin()))
    fitted = dict(zip(PARTS[name], values, strict=True))
    if "weight_bandwidth" in fitted:
        fitted["weight_bandwidth"] = 1 / fitted["weight_bandwidth"] if fitted["weight_bandwidth"] else 1e30
        fitted["weight_bandwidth"] = min(fitted["weight_bandwidth"], known.bandwidth)
    return replace(known, **fitted)


def kernels(cases: list[tuple[object, dict[str, float]]], known: Constants) -> dict[str, Kernel]:
    """Return the Triton backends that were fastest at every timed size from some number of tokens on."""
    fastest = {}
    for name in KERNELS:
        timed = sorted(((f.tokens, f, s) for f, s in cases if name in s), key=lambda case: case[0])
        won = []
        for tokens, spec, seconds in reversed(timed):
            if min(seconds, key=seconds.__getitem__) != name:
                break
            won.append((tokens, spec, seconds[name]))
        if won:
            bare = replace(known, kernels={name: Kernel(0, False, 0.0, 1.0)})
            launch = statistics.median(s - BACKENDS[name].cost(f, bare) for _, f, s in won)
            fastest[name] = Kernel(min(t for t, _, _ in won), False, max(launch, 0.0), 1.0)
    return fastest


def calibrate(dtype: torch.dtype, device: str, shapes: list[Shape], say=print) -> Constants:
    """Return the constants of one dtype, and print a table of their predictions."""
    clock = cpu_clock if device == "cpu" else cuda_clock
    flops, bandwidth = peaks(dtype, device, clock)
    shipped = constants_for(device, dtype)
    known = replace(shipped, flops=flops, bandwidth=bandwidth, kernels={})
    cases = []
    with torch.no_grad():
        for shape in shapes:
            timed = Timed(shape, dtype, device)
            spec = call_spec_of(timed.inputs())
            names = [n for n in (*FITTED, *KERNELS) if BACKENDS[n].supports(spec) is None]
            if BACKENDS["gather"].cost(spec, known) < NEVER_CHEAPEST:
                names.append("gather")  # it uses the same constants
            cases.append((spec, timed.seconds(names, clock)))
    for name in FITTED:
        timed_cases = [case for case in cases if name in case[1]]
        if len(timed_cases) > len(PARTS[name]):
            known = fit(name, timed_cases, known)
    known = replace(known, kernels=kernels(cases, known))
    say(f"\n{device}, {dtype}: {flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s\n")
    say("| tokens, layer, experts | measured us | predicted us | chosen now, regret | with shipped |")
    say("|---|---|---|---|---|")
    for shape, (spec, seconds) in zip(shapes, cases, strict=True):
        cells = [f"{shape.tokens}, {shape.width}x{shape.out}, {shape.experts}x{shape.rank}"]
        cells.append(", ".join(f"{n} {1e6 * s:.0f}" for n, s in seconds.items()))
        cells.append(", ".join(f"{n} {1e6 * BACKENDS[n].cost(spec, known):.0f}" for n in seconds))
        for constants in (known, shipped):
            chosen = min(seconds, key=lambda n: BACKENDS[n].cost(spec, constants))
            cells.append(f"{chosen} {seconds[chosen] / min(seconds.values()):.2f}")
        say("| " + " | ".join(cells) + " |")
    return known


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write the constants to devices.json")
    parser.add_argument("--quick", action="store_true", help="a few tiny shapes: does it run?")
    parser.add_argument("--file", type=Path, default=DEVICES)
    args = parser.parse_args(words)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    shapes = CPU if device == "cpu" else CUDA
    if args.quick:
        shapes = [Shape(t, 64, 96, e, 8) for t in (32, 64) for e in (4, 8, 16)]
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    entry: dict[str, object] = {
        "source": f"benchmarks/calibrate.py, torch {torch.__version__}: measured in layers that run, top-2"
    }
    for dtype in (torch.bfloat16, torch.float32):
        entry[str(dtype)[6:]] = round_all(asdict(calibrate(dtype, device, shapes)))
    print(json.dumps({name: entry}, indent=1))
    if args.write:
        entries = json.loads(args.file.read_text(encoding="utf-8")) if args.file.exists() else {}
        args.file.write_text(json.dumps({**entries, name: entry}, indent=1) + "\n", encoding="utf-8")
        print(f"Written to {args.file}.")


def round_all(numbers):
    """Round to three digits, the precision of the clock."""
    if isinstance(numbers, dict):
        return {key: round_all(value) for key, value in numbers.items()}
    return float(f"{numbers:.3g}") if isinstance(numbers, float) else numbers


if __name__ == "__main__":
    main()
