"""One linear layer: what a mixture costs, as ratios to the bare layer and to one PEFT LoRA of its rank.

    python benchmarks/bench_layer.py            # a minute; appends to benchmarks/results

Parity comes first: without it nothing is printed. Variants run interleaved in one process; medians
with their interquartile range. Floor: the FLOPs that a stacked mixture must do, 2·N·R·(I + O) on top
of the layer's own 2·N·I·O.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import peft
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import peft_moe
from peft_moe import MoLoraConfig
from peft_moe.layer import MoLoraLayer
from peft_moe.ops import mix_reference

SHAPES = [(1024, 1024, 512, 8, 16), (1024, 1024, 512, 32, 16), (2048, 5504, 512, 8, 16)]
REPEATS = 15


def lora(base: nn.Linear, rank: int) -> nn.Module:
    """PEFT's LoRA of one rank on a copy of the layer, B not zero."""
    config = LoraConfig(r=rank, target_modules=["0"], init_lora_weights=False)
    return get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False).eval()


def mixture(base: nn.Linear, experts: int, rank: int, **fields: object) -> nn.Module:
    """Fresh experts and a router on a copy of the layer."""
    config = MoLoraConfig(
        experts=experts, r=rank, target_modules=["0"], init_weights=False, train_experts=False, **fields
    )
    model = get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False).eval()
    layer = next(m for m in model.modules() if isinstance(m, MoLoraLayer))
    for parameter in layer.molora_router.parameters():
        nn.init.normal_(parameter)
    for factors in (layer.molora_A, layer.molora_B):
        factors.to(base.weight.dtype)
    return model


def check_parity(model: nn.Module, x_1NI: Tensor) -> None:
    """The mixture's output equals the loop over experts, in the layer's dtype's precision."""
    layer = next(m for m in model.modules() if isinstance(m, MoLoraLayer))
    gates_NE = layer.molora_router["default"](x_1NI).gates[0]
    A_RI, B_RO = layer.molora_A["default"].weight, layer.molora_B["default"].weight
    base_NO = layer.base_layer(x_1NI)[0]
    wide = mix_reference(
        x_1NI[0].double(),
        A_RI.double(),
        B_RO.double(),
        gates_NE.double(),
        layer.rank_maps["default"],
        base_NO.double(),
    )
    error = (model(x_1NI)[0].double() - wide).norm() / wide.norm()
    assert error < 1e-2, f"parity failed: relative error {error:.1e}"


def clock(variants: dict[str, Callable[[], Tensor]]) -> dict[str, tuple[float, float]]:
    """Median and interquartile range of each variant, in ms, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(REPEATS + 3):
        for name, run in variants.items():
            start = time.thread_time()
            run()
            if repeat >= 3:  # warm-up
                times[name].append(1e3 * (time.thread_time() - start))
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
    return {name: (q[1], q[2] - q[0]) for name, q in quartiles.items()}


def measure(dtype: torch.dtype) -> list[str]:
    """Rows of the table."""
    rows = []
    for I, O, N, E, r in SHAPES:  # noqa: E741  # the shape legend's letters
        torch.manual_seed(0)
        base = nn.Linear(I, O, bias=False, dtype=dtype).requires_grad_(False)
        x_1NI = torch.randn(1, N, I, dtype=dtype)

        def fresh(base: nn.Linear = base) -> nn.Linear:
            copy = nn.Linear(base.in_features, base.out_features, bias=False, dtype=base.weight.dtype)
            copy.weight = base.weight
            return copy

        variants = {
            "base": base,
            "LoRA r": lora(fresh(), r),
            "LoRA E·r": lora(fresh(), E * r),
            "dense": mixture(fresh(), E, r, router="linear"),
            "top 2": mixture(fresh(), E, r, router="linear", top_k=2),
        }
        for name in ("dense", "top 2"):
            check_parity(variants[name], x_1NI)
        with torch.no_grad():
            times = clock({name: (lambda m=m, x=x_1NI: m(x)) for name, m in variants.items()})
        floor = 1 + E * r * (I + O) / (I * O)
        cells = [
            f"{times[n][0] / times['base'][0]:.2f} ± {times[n][1] / times['base'][0]:.2f}" for n in times
        ]
        rows.append(
            f"| {I}×{O}, N={N}, {E}×{r}, {str(dtype)[6:]} | " + " | ".join(cells) + f" | {floor:.2f} |"
        )
    return rows


def main() -> None:
    torch.set_num_threads(1)  # thread CPU time is the only steady clock on a shared machine
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    head = (
        "| layer | base | LoRA r | LoRA E·r | mixture, dense | mixture, top 2 | FLOP floor |\n|---"
        + "|---:" * 6
        + "|"
    )
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in measure(dtype)]
    text = (
        f"## One layer, forward, {date.today()}\n\nRatio to the bare layer, median ± interquartile range of "
        f"{REPEATS}; 1 thread; commit {commit.stdout.strip()}, peft-moe {peft_moe.__version__}, torch "
        f"{torch.__version__}, peft {peft.__version__}, {platform.machine()}.\n\n{head}\n"
        + "\n".join(rows)
        + "\n\n"
    )
    out = Path(__file__).parent / "results" / f"{date.today()}-layer.md"
    out.parent.mkdir(exist_ok=True)
    with out.open("a") as file:
        file.write(text)
    print(text)


if __name__ == "__main__":
    main()
