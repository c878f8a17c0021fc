"""Level "loading": many adapters on a base without weights, in a fresh process.

    python -m benchmarks.suite.loading --layers 32       # prints one JSON object; 64 adapters, 8B's widths

The adapters are hard links to one file, so that the disk holds one. "Peak" is the rise of the process's
resident set, by the kernel's high-water mark. "Mixture" is the size of its factors and routers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import enable_progress_bar

from peft_moe import MoLoraConfig

from .experts import Case, make_base
from .machine import REPO, in_fresh_process
from .memory import reset_peak, status
from .results import Row

# Llama-3-8B's widths and a quarter of its layers, so that the mixture dominates and not the overhead.
SIZES = {"width": 4096, "inner": 14336, "layers": 8, "experts": 64, "rank": 16}


def measure(quick: bool, say: Callable[[str], None]) -> Iterator[Row]:
    """Yield the level's row."""
    sizes = {**SIZES, "width": 256, "inner": 512, "layers": 2, "experts": 4} if quick else SIZES
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    figures = {**in_fresh_process("benchmarks.suite.loading", words), **_start_up()}
    yield Row("loading", "read", Case(experts=sizes["experts"], rank=sizes["rank"]), "ours", extra=figures)
    say("loading")


def _start_up() -> dict[str, float]:
    """Measure the CPU seconds of an import after PEFT, and of adding 8 experts to the suite's model."""
    imports = "import time, peft; a = time.process_time(); import peft_moe; print(time.process_time() - a)"
    command = [sys.executable, "-W", "ignore", "-c", imports]
    outputs = [
        subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout for _ in range(3)
    ]
    config = MoLoraConfig(experts=8, r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    seconds = []
    for _ in range(4):
        base, start = make_base(Case()), time.process_time()
        get_peft_model(base, config)
        seconds.append(time.process_time() - start)
    import_seconds = min(float(text.split()[-1]) for text in outputs)
    return {"import_seconds": import_seconds, "injection_seconds": min(seconds)}


def load(width: int, inner: int, layers: int, experts: int, rank: int) -> dict[str, float]:
    """Return the peak, the sizes and the seconds of loading one mixture."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=max(1, width // 256),
    )  # fmt: skip
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with tempfile.TemporaryDirectory() as folder:
        paths = _adapters(_meta_base(config), folder, targets, experts, rank)
        base = _meta_base(config)
        before, start, cpu = reset_peak(), time.perf_counter(), time.process_time()
        model = get_peft_model(
            base, MoLoraConfig(experts=paths, task_type="CAUSAL_LM", top_k=2, router="linear")
        )
        seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        peak = status("VmHWM") - before
    factors = [p for name, p in model.named_parameters() if "molora_A" in name or "molora_B" in name]
    routers = [p for name, p in model.named_parameters() if "molora_router" in name]
    factor_bytes = sum(p.numel() * p.element_size() for p in factors)
    router_bytes = sum(p.numel() * p.element_size() for p in routers)
    return {
        "experts": experts,
        "layers": layers,
        "width": width,
        "peak_mib": peak / 2**20,
        "mixture_mib": (factor_bytes + router_bytes) / 2**20,
        "routers_mib": router_bytes / 2**20,
        "adapter_mib": factor_bytes / experts / 2**20,
        **seconds,
    }


def _meta_base(config: LlamaConfig) -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def _adapters(base: nn.Module, folder: str, targets: list[str], experts: int, rank: int) -> dict[str, str]:
    model = get_peft_model(
        base, LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM"), low_cpu_mem_usage=True
    )
    state = {
        name.replace(".default", ""): torch.randn(p.shape).to(torch.bfloat16)
        for name, p in model.named_parameters()
        if "lora_" in name
    }
    from safetensors.torch import save_file

    saved = Path(folder) / "0"
    model.peft_config["default"].save_pretrained(str(saved))
    save_file(state, str(saved / "adapter_model.safetensors"))
    for number in range(1, experts):
        linked = Path(folder) / str(number)
        linked.mkdir()
        for file in saved.iterdir():
            os.link(file, linked / file.name)
    return {f"e{number}": str(Path(folder) / str(number)) for number in range(experts)}


def main() -> None:
    """Run one measurement in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    enable_progress_bar()
    print(json.dumps(load(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
