"""One linear layer on one GPU: each backend of the mixture beside the bare layer, LoRAs and the roofline.

    python benchmarks/gpu_layer.py --quick      # about 25 s of a GPU
    python benchmarks/gpu_layer.py              # about 80 s; both write <out>/gpu_layer.json

Parity comes first: a backend with wrong results is not timed. Times are medians of CUDA events with a cold L2
(triton.testing.do_bench); "graph" rows replay a CUDA graph. The router is not timed, its decision is fixed.
The floor is the time of the added bytes (x read, base read, y written, the chosen slabs) at the measured copy
bandwidth, or of the added FLOPs at the measured rate of a large product, whichever is longer. Sections are
independent: one that fails prints its traceback, and the next one runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
try:
    import peft_moe
except Exception as error:  # the ops need only torch and Triton
    print(f"peft_moe without its package ({type(error).__name__}: {error})")
    peft_moe = types.ModuleType("peft_moe")
    peft_moe.__path__ = [str(ROOT / "peft_moe")]
    sys.modules["peft_moe"] = peft_moe

from support.mixtures import distance, draw_mixture  # noqa: E402

from peft_moe.ops import BACKENDS, RankMap, call_spec_of, choose  # noqa: E402
from peft_moe.ops.backend import MixInputs  # noqa: E402

K = 2
BF16 = torch.bfloat16
RESULTS: dict[str, Any] = {"cases": [], "pieces": [], "tiles": [], "errors": []}
STARTED = time.time()


def say(*words: object) -> None:
    print(*words, flush=True)


def median(run: Callable[[], object], rep: int = 20) -> float:
    """Return the median microseconds with a cold L2."""
    from triton.testing import do_bench

    return 1e3 * float(do_bench(run, warmup=5, rep=rep, return_mode="median"))


def guarded(section: Callable[..., None], *arguments: object) -> None:
    start = time.time()
    try:
        section(*arguments)
    except Exception:
        RESULTS["errors"].append(traceback.format_exc())
        say(traceback.format_exc()[-1500:])
    torch.cuda.empty_cache()
    say(f"[{section.__name__}: {time.time() - start:.1f} s]")


class Case:
    """Random inputs of one shape; the variants are timed on them."""

    def __init__(self, tokens: int, shape: tuple[int, int], experts: int, rank: int) -> None:
        self.tokens, (self.I, self.O), self.E, self.r = tokens, shape, experts, rank
        generator = torch.Generator(device="cuda").manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device="cuda", dtype=BF16)

        self.x, self.W = normal(tokens, self.I), normal(self.O, self.I) * self.I**-0.5
        self.A, self.B = normal(experts * rank, self.I) * self.I**-0.5, normal(experts * rank, self.O)
        scores = torch.randn(tokens, experts, generator=generator, device="cuda")
        weights, self.ids = scores.topk(K)
        self.weights = weights.softmax(-1)
        self.gates = torch.zeros_like(scores).scatter(1, self.ids, self.weights)
        self.ranks = RankMap((rank,) * experts, (1.0,) * experts)

    def inputs(self, x: Tensor, weights: Tensor) -> MixInputs:
        base = functional.linear(x, self.W)
        return MixInputs(x, self.A, self.B, weights, self.ranks, base, self.ids, weights)

    def lora(self, rank: int) -> torch.nn.Module:
        """Make PEFT's LoRA of this layer."""
        linear = torch.nn.Linear(self.I, self.O, bias=False, device="meta")
        linear.weight = torch.nn.Parameter(self.W, requires_grad=False)
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights=False)
        model = get_peft_model(torch.nn.Sequential(linear), config, autocast_adapter_dtype=False)
        return model.to(device="cuda", dtype=BF16)

    def floor(self, peak: float, bandwidth: float) -> float:
        """Return the microseconds that the chosen experts add at least."""
        slabs = min(self.E, self.tokens * K) * self.r * (self.I + self.O)
        moved = 2 * (self.tokens * (self.I + 2 * self.O) + slabs)
        return 1e6 * max(moved / bandwidth, 2 * self.tokens * K * self.r * (self.I + self.O) / peak)


def as_graph(run: Callable[[], object]) -> Callable[[], object]:
    """Record the work in a CUDA graph and return its replay."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(), run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def forward_variants(case: Case) -> dict[str, Callable[[], object]]:
    variants: dict[str, Callable[[], object]] = {"base": lambda: functional.linear(case.x, case.W)}
    for name, rank in (("lora r", case.r), ("lora kr", K * case.r), ("lora Er", case.E * case.r)):
        model = case.lora(rank)
        variants[name] = lambda m=model: m(case.x)
    choice = choose(call_spec_of(case.inputs(case.x, case.weights)))
    for name in choice.costs:
        variants[name] = lambda f=BACKENDS[name]: f.mix(case.inputs(case.x, case.weights))
    if case.E > 8:
        variants.pop("reference", None)
    if case.tokens > 512:  # gigabytes of copied slabs
        variants.pop("gather", None)
    RESULTS["auto"] = choice.backend.name
    return variants


def training_variants(case: Case) -> dict[str, Callable[[], object]]:
    x, weights = case.x.clone().requires_grad_(), case.weights.clone().requires_grad_()
    direction = torch.randn(case.tokens, case.O, device="cuda", dtype=BF16)

    def backward(out: Tensor) -> None:
        out.backward(direction)
        x.grad = weights.grad = None

    variants: dict[str, Callable[[], object]] = {"base": lambda: backward(functional.linear(x, case.W))}
    for name, rank in (("lora r", case.r), ("lora kr", K * case.r), ("lora Er", case.E * case.r)):
        model = case.lora(rank)
        variants[name] = lambda m=model: (backward(m(x)), m.zero_grad())
    with torch.enable_grad():
        choice = choose(call_spec_of(case.inputs(x, weights)))
    for name in choice.costs:
        variants[name] = lambda f=BACKENDS[name]: backward(f.mix(case.inputs(x, weights)))
    if case.E > 8:
        variants.pop("reference", None)
    if case.tokens > 512:  # gigabytes of copied slabs
        variants.pop("gather", None)
    RESULTS["auto"] = choice.backend.name
    return variants


def time_case(case: Case, mode: str, peak: float, bandwidth: float) -> None:
    with torch.set_grad_enabled(mode == "train"):
        variants = (training_variants if mode == "train" else forward_variants)(case)
        times: dict[str, float] = {}
        for name, run in variants.items():
            try:
                times[name] = median(as_graph(run) if mode == "graph" else run)
            except Exception as error:
                RESULTS["errors"].append(f"{mode} {name}: {traceback.format_exc()}")
                say(f"   {mode} {name} failed: {type(error).__name__}: {str(error)[:150]}")
    floor = case.floor(peak, bandwidth) * (2.2 if mode == "train" else 1)
    row = {"mode": mode, "T": case.tokens, "I": case.I, "O": case.O, "E": case.E, "r": case.r}
    RESULTS["cases"].append({**row, "floor": floor, "auto": RESULTS["auto"], "us": times})
    base = times["base"]
    cells = " ".join(f"{name}:{us / base:.2f}" for name, us in times.items() if name != "base")
    ours = {n: us for n, us in times.items() if n in BACKENDS}
    if not ours:
        return say(f"{mode} T{case.tokens}: no backend ran")
    best = min(ours, key=lambda n: ours[n])
    reached = floor / max(ours[best] - base, 1e-3)
    head = f"{mode:5} T{case.tokens:<4} {case.I}x{case.O} {case.E}x{case.r}"
    say(f"{head} base {base:.0f}us | {cells} | best {best} auto {RESULTS['auto']} floor {reached:.0%}")


def environment() -> None:
    import triton

    device = torch.cuda.get_device_properties(0)
    name = f"{device.name}, torch {torch.__version__}, triton {triton.__version__}"
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copied = median(lambda: target.copy_(source), 50)
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=BF16) for _ in range(2))
    multiplied = median(lambda: left @ right, 50)
    RESULTS["device"] = name
    RESULTS["bandwidth"] = 2 * 2**30 / copied * 1e6
    RESULTS["peak"] = 2 * 8192**3 / multiplied * 1e6
    say(f"{name} | copy {RESULTS['bandwidth'] / 1e12:.2f} TB/s, bf16 {RESULTS['peak'] / 1e12:.0f} TFLOP/s")


def parity() -> None:
    """Compare each backend's output and router gradients with float64."""
    bad = []
    for dtype, bound in ((BF16, 8e-3), (torch.float16, 2e-3), (torch.float32, 1e-5)):
        for tokens, experts, rank in ((300, 8, 16), (7, 128, 8), (1, 8, 64)):
            m = draw_mixture(tokens, 512, 384, (rank,) * experts, K, dtype=dtype, device="cuda")
            for train in (False, True):
                x, weights = (t.clone().requires_grad_(train) for t in (m.x, m.weights))
                inputs = MixInputs(x, m.a, m.b, weights, m.ranks, m.base, m.ids, weights)
                for name in choose(call_spec_of(inputs)).costs:
                    bad += check_backend(name, inputs, m, bound, train)
    say("parity:", "all backends agree with float64" if not bad else "; ".join(bad))
    # Only bf16 is timed, so a backend that fails in another dtype stays in.
    for name in {
        line.split()[0] for line in bad if " bfloat16 " in line and not line.startswith("reference")
    }:
        RESULTS["errors"].append(f"not timed, wrong: {name}")
        del BACKENDS[name]


def check_backend(name: str, inputs: MixInputs, m: Any, bound: float, train: bool) -> list[str]:
    label = f"{name} {str(m.x.dtype)[6:]} T{len(m.x)} E{len(m.ranks.ranks)} {'train' if train else 'forward'}"
    try:
        out = BACKENDS[name].mix(inputs)
        errors = [distance(out, m.expected())]
        if train:
            direction = torch.randn_like(out)
            dx, dw = torch.autograd.grad(out, (inputs.x, inputs.weights), direction)
            expected_dx, expected_dw = m.expected_gradients(direction)
            absent = m.ids.cpu() == len(m.ranks.ranks)
            errors += [
                distance(dx, expected_dx),
                distance(dw.masked_fill(absent.to(dw.device), 0), expected_dw.masked_fill(absent, 0)),
            ]
        return [] if max(errors) <= bound else [f"{label} off by {max(errors):.1e}"]
    except Exception as error:
        RESULTS["errors"].append(label + "\n" + traceback.format_exc())
        return [f"{label} raised {type(error).__name__}: {str(error)[:200]}"]


def pieces(shapes: list[tuple[int, tuple[int, int], int, int]]) -> None:
    """Time each kernel alone, beside cuBLAS on the same product."""
    for shape in shapes:
        pieces_of(shape)


def pieces_of(shape: tuple[int, tuple[int, int], int, int]) -> None:
    from peft_moe.ops.triton import sparse as triton_sparse
    from peft_moe.ops.triton import stacked as triton_stacked
    from peft_moe.ops.triton.common import rank_tables
    from peft_moe.ops.triton.schedule import make_schedule

    c = Case(*shape)
    base = functional.linear(c.x, c.W)
    tables = rank_tables(c.ranks.ranks, c.ranks.scaling, c.x.device)
    rows = triton_sparse.rows_per_block(c.tokens, c.E)
    schedule = make_schedule(c.ids, c.E, rows)
    hg, h = triton_sparse.shrink(c.x, c.A, c.weights, schedule, tables, keep=True)
    flat, dense_h = triton_stacked.stacked_shrink(c.x, c.A, c.weights, tables, expert_ids_NK=c.ids, keep=True)
    runs: dict[str, Callable[[], object]] = {
        "schedule": lambda: make_schedule(c.ids, c.E, rows),
        "shrink": lambda: triton_sparse.shrink(c.x, c.A, c.weights, schedule, tables),
        "shrink+h": lambda: triton_sparse.shrink(c.x, c.A, c.weights, schedule, tables, keep=True),
        "shrink bwd": lambda: triton_sparse.shrink(base, c.B, c.weights, schedule, tables, h_NKQ=h),
        "expand": lambda: triton_sparse.expand(hg, c.B, schedule, tables, base),
        "expand dx": lambda: triton_sparse.expand(hg, c.A, schedule, tables, None),
        "gated A": lambda: triton_stacked.stacked_shrink(c.x, c.A, c.weights, tables, expert_ids_NK=c.ids),
        "gated A dense": lambda: triton_stacked.stacked_shrink(c.x, c.A, c.gates, tables),
        "gated bwd": lambda: triton_stacked.stacked_shrink(
            base, c.B, c.weights, tables, expert_ids_NK=c.ids, h=dense_h
        ),
        "cublas A": lambda: functional.linear(c.x, c.A),
        "cublas dy Bt": lambda: base @ c.B.T,
        "add B": lambda: triton_stacked.stacked_expand(flat, c.B, base),
        "addmm B": lambda: torch.addmm(base, flat, c.B),
        "addmm_ B": lambda: base.addmm_(flat, c.B, beta=0.5, alpha=0.5),
        "cublas dx": lambda: flat @ c.A,
        "y pass": lambda: base + base,
    }
    times = {}
    with torch.no_grad():
        for name, run in runs.items():
            try:
                times[name] = median(run)
            except Exception as error:
                say(f"   {name}: {type(error).__name__}: {str(error)[:150]}")
    RESULTS["pieces"].append({"shape": shape, "rows": rows, "us": times})
    say(f"pieces T{c.tokens} {c.I}x{c.O} {c.E}x{c.r}:", " ".join(f"{n}={t:.0f}" for n, t in times.items()))


def tiles(shapes: list[tuple[int, tuple[int, int], int, int]]) -> None:
    """Time other tile sizes than the default ones, kernel by kernel; print the three best of each."""
    for shape in shapes:
        tiles_of(shape)


def tiles_of(shape: tuple[int, tuple[int, int], int, int]) -> None:
    from peft_moe.ops.triton import sparse as triton_sparse
    from peft_moe.ops.triton import stacked as triton_stacked
    from peft_moe.ops.triton.common import Tiles, rank_tables
    from peft_moe.ops.triton.schedule import make_schedule

    c = Case(*shape)
    base = functional.linear(c.x, c.W)
    tables = rank_tables(c.ranks.ranks, c.ranks.scaling, c.x.device)
    columns_A = min(128, c.E * c.r)
    times_of: dict[str, dict[str, float]] = {}

    def attempt(kernel: str, label: str, run: Callable[[], object]) -> None:
        try:
            times_of.setdefault(kernel, {})[label] = median(run, 10)
        except Exception as error:
            times_of.setdefault(kernel, {})[f"{label} {type(error).__name__}"] = 1e9

    for rows in (16, 32, 64):
        schedule = make_schedule(c.ids, c.E, rows)
        hg, _ = triton_sparse.shrink(c.x, c.A, c.weights, schedule, tables)
        for depth, warps, stages in ((64, 4, 4), (128, 4, 3), (128, 8, 4), (256, 4, 3), (256, 8, 3)):
            t = Tiles(rows, tables.tile, depth, warps, stages)
            label = f"{rows}/{depth}/{warps}w{stages}s"
            attempt(
                "shrink",
                label,
                lambda s=schedule, t=t: triton_sparse.shrink(c.x, c.A, c.weights, s, tables, tiles=t),
            )
        for columns, warps in ((64, 4), (128, 4), (256, 4), (256, 8), (512, 8)):
            t = Tiles(rows, columns, tables.tile, warps, 2)
            attempt(
                "expand",
                f"{rows}/{columns}/{warps}w",
                lambda h=hg, s=schedule, t=t: triton_sparse.expand(h, c.B, s, tables, base, tiles=t),
            )
    for rows, depth, warps, stages in (
        (16, 128, 4, 4), (32, 64, 4, 5), (32, 128, 4, 3), (32, 128, 8, 3),
        (64, 64, 4, 4), (64, 128, 8, 3), (128, 64, 8, 4)
    ):  # fmt: skip
        t = Tiles(rows, columns_A, depth, warps, stages)
        attempt(
            "gated A",
            f"{rows}/{columns_A}/{depth}/{warps}w{stages}s",
            lambda t=t: triton_stacked.stacked_shrink(
                c.x, c.A, c.weights, tables, expert_ids_NK=c.ids, tiles=t
            ),
        )
    flat = functional.linear(c.x, c.A)
    for rows, columns, depth, warps, stages in (
        (64, 128, 64, 4, 3), (128, 128, 64, 8, 3), (128, 128, 32, 4, 4), (64, 256, 64, 8, 3),
        (128, 256, 64, 8, 3)
    ):  # fmt: skip
        t = Tiles(rows, columns, depth, warps, stages)
        attempt(
            "add B",
            f"{rows}/{columns}/{depth}/{warps}w{stages}s",
            lambda t=t: triton_stacked.stacked_expand(flat, c.B, base, tiles=t),
        )
    RESULTS["tiles"].append({"shape": shape, "us": times_of})
    for kernel, times in times_of.items():
        best = sorted(times.items(), key=lambda item: item[1])
        ranking = ", ".join(f"{label}={us:.0f}" for label, us in [*best[:3], best[-1]])
        say(f"tiles T{c.tokens} {c.I}x{c.O} {c.E}x{c.r} {kernel}: {ranking} (worst last)")


def fit() -> None:
    """Fit the cost model's terms to the seconds that each backend added to the layer."""
    for name in BACKENDS:
        rows, added = [], []
        for case in RESULTS["cases"]:
            if case["mode"] != "fwd" or name not in case["us"]:
                continue
            T, sizes, ranks = case["T"], case["I"] + case["O"], case["E"] * case["r"]
            if name == "triton_sorted":
                moved = 2 * T * K * (case["I"] + 2 * case["O"])
                rows.append([moved, 2 * min(case["E"], T) * K * case["r"] * sizes, 1.0])
            else:
                rows.append([2 * T * ranks * sizes, T * ranks + T * case["O"], 1.0])
            added.append((case["us"][name] - case["us"]["base"]) * 1e-6)
        if len(rows) >= 4:
            solution = torch.linalg.lstsq(torch.tensor(rows).double(), torch.tensor(added).double()[:, None])
            terms = ("per byte", "per slab byte") if name == "triton_sorted" else ("per FLOP", "per element")
            fitted = {k: float(v) for k, v in zip((*terms, "launch"), solution.solution[:, 0], strict=True)}
            RESULTS.setdefault("fit", {})[name] = fitted
            say(f"fit {name}:", " ".join(f"{k} {v:.2e}" for k, v in fitted.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "benchmarks/results")))
    options = parser.parse_args()
    square, ffn = (4096, 4096), (4096, 14336)
    big = [(4096, square, 8, 16), (4096, square, 128, 16)]
    grid: list[tuple[str, int, tuple[int, int], int, int]] = [
        ("fwd", 4096, square, 8, 16),
        ("train", 4096, square, 8, 16),
        ("fwd", 4096, square, 128, 16),
        ("train", 4096, square, 128, 16),
        ("fwd", 512, square, 32, 16),
        ("graph", 1, square, 8, 16),
        ("graph", 8, square, 128, 16),
    ]
    if not options.quick:
        big += [(4096, square, 32, 64), (512, square, 32, 16)]
        grid += [("fwd", 1, square, 8, 16), ("train", 512, square, 32, 16)]
        grid += [("fwd", 4096, square, e, r) for e, r in ((8, 8), (32, 16), (8, 64), (32, 64), (128, 64))]
        grid += [("train", 4096, square, e, r) for e, r in ((32, 16), (32, 64))]
        grid += [(m, 4096, ffn, e, 16) for e in (8, 32, 128) for m in ("fwd", "train")]
        grid += [("fwd", 512, shape, e, 16) for shape in (square, ffn) for e in (8, 128)]
        grid += [("graph", t, shape, e, 16) for t in (1, 8) for shape in (square, ffn) for e in (8, 128)]
    guarded(environment)
    guarded(parity)
    guarded(pieces, big)
    for mode, tokens, shape, experts, rank in grid:
        try:
            time_case(Case(tokens, shape, experts, rank), mode, RESULTS["peak"], RESULTS["bandwidth"])
        except Exception:
            RESULTS["errors"].append(traceback.format_exc())
            say(traceback.format_exc()[-800:])
        torch.cuda.empty_cache()
    guarded(fit)
    guarded(tiles, big[1:2] if options.quick else big)
    options.out.mkdir(parents=True, exist_ok=True)
    RESULTS["seconds"] = time.time() - STARTED
    (options.out / "gpu_layer.json").write_text(json.dumps(RESULTS, indent=1))
    say(f"{len(RESULTS['errors'])} errors; {RESULTS['seconds']:.0f} s; {options.out / 'gpu_layer.json'}")


if __name__ == "__main__":
    main()
