"""Training a router on an 8B base in 4 bits: peak memory and tokens per second, beside the plan.

    python benchmarks/gpu_memory.py                       # Llama-3-8B's dimensions, under a minute on an H100
    python benchmarks/gpu_memory.py --layers 2 --small    # a test of the script, also on a CPU

The base has random weights, made and quantised layer by layer on the device: nothing is downloaded, and at
most one layer exists in 16 bits. Cases are independent: one that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, PreTrainedTokenizerFast

from peft_moe import MoLoraConfig
from peft_moe.planning import MemoryPlan, Training, plan_memory
from peft_moe.tuner.layers.linear import MoLoraLayer

LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
GIB = 2**30
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.bfloat16,
}


def random_nf4_base(config: LlamaConfig, device: torch.device) -> nn.Module:
    """Make a base of random numbers in nf4 with double quantisation, within seconds."""
    import bitsandbytes as bnb
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    replace_with_bnb_linear(model, ["lm_head"], BitsAndBytesConfig(**NF4))
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is None:
                continue
            if isinstance(module, bnb.nn.Linear4bit) and name == "weight":
                dense = torch.randn(module.out_features, module.in_features, device=device).mul_(0.02)
                new: Any = bnb.nn.Params4bit(
                    dense.bfloat16(),
                    requires_grad=False,
                    compress_statistics=True,
                    quant_type="nf4",
                    module=module,
                ).to(device)
            else:
                values = torch.ones if old.dim() == 1 else torch.randn
                new = nn.Parameter(
                    values(old.shape, device=device, dtype=torch.bfloat16), requires_grad=False
                )
                if old.dim() > 1:
                    new.data.mul_(0.02)
            module._parameters[name] = new
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config).to(device)
    model.is_loaded_in_4bit = True
    model.config.quantization_config = BitsAndBytesConfig(**NF4)
    return model


def mix(base: nn.Module, router: str, experts: int, rank: int) -> Any:
    """Add a router and frozen bf16 experts of random numbers to every linear layer."""
    fields = {"experts": experts, "r": rank, "router": router, "target_modules": "all-linear"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = MoLoraConfig(task_type="CAUSAL_LM", train_experts=False, init_weights=False, **fields)
        model = get_peft_model(base, config, autocast_adapter_dtype=False, low_cpu_mem_usage=False)
    for layer in model.modules():
        if isinstance(layer, MoLoraLayer):
            for factors in (layer.molora_A, layer.molora_B):
                factors.to(torch.bfloat16)
    return model


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer, which TRL requires although the samples are token ids."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<bos>": 1, "<eos>": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def trl_steps(model: Any, args: argparse.Namespace, checkpointing: bool) -> Callable[[int], None]:
    """Return a function that runs steps of the package's SFT trainer."""
    from datasets import Dataset
    from trl import SFTConfig

    from peft_moe.training import MoLoraSFTTrainer

    on_cpu = args.device == "cpu"
    rows = torch.randint(3, args.vocab, (args.batch * 16, args.sequence)).tolist()
    data = Dataset.from_dict({"input_ids": rows})

    def run(steps: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            settings = SFTConfig(
                folder,
                max_steps=steps,
                per_device_train_batch_size=args.batch,
                learning_rate=5e-3,
                gradient_checkpointing=checkpointing,
                max_length=None,
                bf16=False,  # the base already computes in bfloat16
                report_to=[],
                save_strategy="no",
                logging_steps=steps,
                disable_tqdm=True,
                use_cpu=on_cpu,
                dataloader_pin_memory=not on_cpu,
            )
            MoLoraSFTTrainer(model, settings, train_dataset=data, processing_class=word_tokenizer()).train()

    return run


def plain_steps(model: Any, args: argparse.Namespace, checkpointing: bool) -> Callable[[int], None]:
    """Return a function that runs steps without a trainer, with the loss of transformers on all logits."""
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    ids = torch.randint(3, args.vocab, (args.batch, args.sequence), device=args.device)

    def run(steps: int) -> None:
        optimizer = torch.optim.AdamW(trained, lr=5e-3)
        for _ in range(steps):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


class Meter:
    """Peak memory of the device since the last reset; zeros on a CPU."""

    def __init__(self, device: str) -> None:
        self.on = device == "cuda"

    def reset(self) -> None:
        gc.collect()
        if self.on:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def read(self) -> dict[str, float]:
        if not self.on:
            return {"allocated_gib": 0.0, "reserved_gib": 0.0}
        torch.cuda.synchronize()
        return {
            "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
            "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        }


def plan(sizes: dict[str, Any], args: argparse.Namespace, case: dict[str, Any]) -> MemoryPlan:
    """Return the plan of `peft-moe plan` for a case."""
    fields = {"experts": args.experts, "r": args.rank, "router": case["router"], "task_type": "CAUSAL_LM"}
    return plan_memory(
        LlamaConfig(**sizes),
        MoLoraConfig(**fields),
        Training(
            batch=args.batch,
            sequence=args.sequence,
            precision="nf4",
            double_quant=True,
            checkpointing=case["checkpointing"],
            loss=case["loss"],
            device=args.device,
        ),
    )


def measure(base: nn.Module, args: argparse.Namespace, case: dict[str, Any], planned: MemoryPlan) -> dict:
    """Run one case and return the planned and the measured memory, and the speed."""
    checkpointing, loss = case["checkpointing"], case["loss"]
    model = mix(base, case["router"], args.experts, args.rank)
    meter = Meter(args.device)
    try:
        meter.reset()
        loaded = torch.cuda.memory_allocated() / GIB if meter.on else 0.0
        steps = (trl_steps if loss == "fused" else plain_steps)(model, args, checkpointing)
        meter.reset()
        steps(2)
        peaks = meter.read()
        start = time.perf_counter()
        steps(args.steps)
        if meter.on:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    finally:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
        model.unload()
        del model
        meter.reset()
    return {
        **case,
        "planned_gib": planned.total / GIB,
        "loaded_gib": loaded,
        **peaks,
        "plan_over_measured": planned.total / GIB / peaks["allocated_gib"] if meter.on else None,
        "tokens_per_second": args.steps * args.batch * args.sequence / seconds,
        "parts_gib": {name: round(size / GIB, 3) for name, size in planned.parts.items()},
    }


CASES = [
    {"router": "auto", "checkpointing": True, "loss": "fused"},
    {"router": "auto", "checkpointing": False, "loss": "fused"},
    {"router": "linear", "checkpointing": True, "loss": "fused"},
    {"router": "linear", "checkpointing": False, "loss": "fused"},
    {"router": "auto", "checkpointing": True, "loss": "full"},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--small", action="store_true", help="tiny width and vocabulary, to test the script")
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=5, help="processes that make the plans")
    parser.add_argument("--out", default="", help="file for the rows, as JSON")
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {**LLAMA_3_8B, "num_hidden_layers": args.layers}
    if args.small:
        sizes |= {**SMALL, "vocab_size": 512}
    start, args.vocab = time.perf_counter(), sizes["vocab_size"]
    # Plans need CPU cores and not the device, so they are made in parallel.
    workers = ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"))
    plans = [workers.submit(plan, sizes, args, case) for case in CASES]
    base = random_nf4_base(LlamaConfig(**sizes), torch.device(args.device))
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}; base made in {time.perf_counter() - start:.1f} s", flush=True)
    rows = []
    for case, planned in zip(CASES, plans, strict=True):
        start = time.perf_counter()
        try:
            rows.append(measure(base, args, case, planned.result(timeout=120)))
            row = {k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}
            print(json.dumps({**row, "seconds": round(time.perf_counter() - start, 1)}), flush=True)
        except Exception:  # a failed case must not stop the others
            print(f"FAILED {case}\n{traceback.format_exc()}", flush=True)
    workers.shutdown()
    if args.out:
        with open(args.out, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
