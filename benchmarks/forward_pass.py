"""What a forward pass costs in Python: calls per adapted linear layer, and the files that a pass visits.

    python -m benchmarks.forward_pass

The base is a small Llama with random weights. A call is one Python call inside the library's own files
(``peft_moe``, or ``peft`` for the comparison with PEFT's LoRA); calls inside torch and transformers do not
count. The calls per linear layer are the slope between a model of two and one of four decoder layers, so that
what happens once per pass is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import peft
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peft_moe
from peft_moe import MoLoraConfig

EXPERTS, RANK = 4, 4
LINEARS_PER_LAYER = 7
OURS, PEFTS = Path(peft_moe.__file__).parent, Path(peft.__file__).parent


def base(layers: int) -> nn.Module:
    """A Llama of a few decoder layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=layers, **sizes)).eval()


def adapters(folder: Path, layers: int) -> dict[str, str]:
    """LoRA adapters on every linear layer of that base, as PEFT saves them."""
    paths = {}
    for number in range(EXPERTS):
        path = folder / f"layers-{layers}" / f"expert{number}"
        if not path.exists():
            torch.manual_seed(number)
            config = LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
            get_peft_model(base(layers), config).save_pretrained(path)
        paths[path.name] = str(path)
    return paths


def mixture(layers: int, folder: Path, **fields: Any) -> nn.Module:
    """A mixture on that base."""
    config = MoLoraConfig(experts=adapters(folder, layers), **fields)
    return get_peft_model(base(layers), config).eval()


def lora(layers: int) -> nn.Module:
    """PEFT's own LoRA with as many ranks as all experts together."""
    config = LoraConfig(r=RANK * EXPERTS, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(base(layers), config).eval()


class Calls:
    """Counts the Python calls of one forward pass, by file and function."""

    def __init__(self, root: Path) -> None:
        self.root = f"{root}/"
        self.counts: Counter[tuple[str, str]] = Counter()

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(self.root):
            self.counts[name.removeprefix(self.root), frame.f_code.co_qualname] += 1

    def of(self, model: nn.Module) -> Counter[tuple[str, str]]:
        """Count one pass, after a first one that fills every memo."""
        ids = torch.arange(12).reshape(2, 6)
        with torch.no_grad():
            model(input_ids=ids)
            sys.setprofile(self._profile)
            try:
                model(input_ids=ids)
            finally:
                sys.setprofile(None)
        return self.counts


def measure(make: Callable[[int], nn.Module], root: Path) -> dict[str, Any]:
    """Calls per adapted linear layer, files per pass, and the functions that a layer calls."""
    few, many = (Calls(root).of(make(layers)) for layers in (2, 4))
    added = many - few
    linears = 2 * LINEARS_PER_LAYER
    return {
        "calls_per_linear": sum(added.values()) / linears,
        "files_per_linear": len({file for file, _ in added}),
        "files_per_pass": len({file for file, _ in many}),
        "functions": {f"{file}:{name}": count / linears for (file, name), count in added.most_common()},
        "files": sorted({file for file, _ in many}),
    }


def cases(folder: Path) -> dict[str, tuple[Callable[[int], nn.Module], Path]]:
    """What is measured, by name."""
    fields: dict[str, dict[str, Any]] = {
        "linear": {"router": "linear"},
        "linear, top-2": {"router": "linear", "top_k": 2},
        "linear per block": {"router": "linear", "router_scope": "block"},
        "uniform": {"router": "uniform"},
        "auto": {"router": "auto"},
    }
    ours = {
        name: (lambda layers, own=own: mixture(layers, folder, **own), OURS) for name, own in fields.items()
    }
    return {"PEFT LoRA": (lora, PEFTS), **ours}


def main(arguments: list[str] | None = None) -> None:
    """Print a table, or everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print every function and file as JSON")
    as_json = parser.parse_args(arguments).json
    with tempfile.TemporaryDirectory() as folder:
        rows = {name: measure(make, root) for name, (make, root) in cases(Path(folder)).items()}
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'':18}{'calls per linear':>18}{'files per linear':>18}{'files per pass':>16}")
    for name, row in rows.items():
        numbers = f"{row['calls_per_linear']:18.1f}{row['files_per_linear']:18}{row['files_per_pass']:16}"
        print(f"{name:18}{numbers}")


if __name__ == "__main__":
    main()
