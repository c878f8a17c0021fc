"""Run as a script: train a router on a base of the given size, and print what this process took for it.

    python measure_rss.py '{"hidden_size": 512, …}' '{"router": "linear", …}' '{"batch": 2, …}'

The arguments are a LlamaConfig's, a MoLoraConfig's and a planning.Training's fields, as JSON. Prints JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from peft_moe import MoLoraConfig
from peft_moe.tuner.layers.linear import MoLoraLayer


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(field))
    return int(line.split()[1]) * 1024


def load(config: LlamaConfig, training: dict[str, Any]) -> Any:
    dtype = getattr(torch, training["dtype"])
    if training.get("precision", "full") == "full":
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    if training["precision"] != "int8":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=training["precision"],
            bnb_4bit_use_double_quant=training.get("double_quant", False),
            bnb_4bit_compute_dtype=dtype,
        )
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantization, dtype=dtype, device_map="cpu"
        )


def mix(base: Any, mixture: dict[str, Any], dtype: torch.dtype) -> Any:
    fields = {
        "train_experts": False,
        "init_weights": False,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
        **mixture,
    }
    model = get_peft_model(base, MoLoraConfig(**fields), autocast_adapter_dtype=False)
    for layer in model.modules():
        if isinstance(layer, MoLoraLayer):
            layer.molora_A.to(dtype)
            layer.molora_B.to(dtype)
    return model


def train(model: Any, training: dict[str, Any], folder: str) -> None:
    from support.training import make_trainer

    rows = [{"input_ids": [3 + (i + j) % 40 for j in range(training["sequence"])]} for i in range(8)]
    trainer = make_trainer(
        "sft",
        model,
        Dataset.from_list(rows),
        Path(folder),
        max_steps=2,
        per_device_train_batch_size=training["batch"],
        gradient_checkpointing=training.get("checkpointing", True),
        bf16=training.get("autocast") == "bfloat16",
    )
    trainer.train()


def main() -> None:
    base, mixture, training = (json.loads(text) for text in sys.argv[1:4])
    with tempfile.TemporaryDirectory() as folder:
        # Libraries load the rest of themselves in a first, tiny run, which is not what is measured.
        tiny = {**base, "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 48}
        short = {**training, "sequence": 8, "batch": 1}
        train(
            mix(load(LlamaConfig(**tiny), short), mixture, getattr(torch, training["dtype"])), short, folder
        )
        before = status("VmRSS")
        model = load(LlamaConfig(**base), training)
        model = mix(model, mixture, getattr(torch, training["dtype"]))
        loaded = status("VmRSS")
        train(model, training, folder)
    print(json.dumps({"before": before, "loaded": loaded, "peak": status("VmHWM")}))


if __name__ == "__main__":
    main()
