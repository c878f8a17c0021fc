"""Rebuild the demo's assets from nothing: the tokenizer, the base model, and its LoRA experts.

    python recipes/demo/build_assets.py base            # about 25 minutes on one core
    python recipes/demo/build_assets.py experts         # about 5 minutes per expert
    python recipes/demo/build_assets.py experts --only reverse roman
    python recipes/demo/measure.py                      # prints what the assets can do

Memory stays under 1 GB. The base's last loss is about 0.1 (completions and lightly weighted
prompts), an expert's below 0.01. Weights are written in bfloat16 into peft_moe/demo/assets.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rows import Rows, base_rows, expert_rows
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from transformers import LlamaConfig, LlamaForCausalLM

import peft_moe.demo
from peft_moe.demo import BASE_NAME
from peft_moe.demo.skills import EXPERTS
from peft_moe.demo.tokenizer import demo_tokenizer

ASSETS = Path(peft_moe.demo.__file__).parent / "assets"
LENGTHS = (96, 288)  # one question or two from the start of a text, and many in a row
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEARS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    steps: int
    learning_rate: float
    warmup: int
    weight_decay: float
    tokens_per_step: int


BASE_SCHEDULE = Schedule(1400, 2.0e-3, warmup=100, weight_decay=0.05, tokens_per_step=4096)
EXPERT_SCHEDULE = Schedule(500, 2.0e-3, warmup=20, weight_decay=0.0, tokens_per_step=2048)


@dataclass(frozen=True)
class Recipe:
    """One expert's adapter. The experts differ as those of different authors would."""

    rank: int
    alpha: int
    seed: int
    use_rslora: bool = False
    targets: list[str] = field(default_factory=lambda: list(LINEARS))


RECIPES = {
    "reverse": Recipe(rank=16, alpha=32, seed=11),
    "roman": Recipe(rank=16, alpha=16, seed=12),
    "date": Recipe(rank=8, alpha=8, seed=13, use_rslora=True),
    "units": Recipe(rank=8, alpha=32, seed=14),
    "query": Recipe(rank=16, alpha=32, seed=15, targets=list(ATTENTION)),
}


def train(model: nn.Module, rows: Rows, plan: Schedule, name: str) -> None:
    """AdamW with warm-up and a cosine; the loss is weighted per token by the rows."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, plan.learning_rate, betas=(0.9, 0.98), weight_decay=plan.weight_decay
    )
    warm = lr_scheduler.LinearLR(optimizer, 1 / plan.warmup, total_iters=plan.warmup)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, plan.steps - plan.warmup)
    schedule = lr_scheduler.SequentialLR(optimizer, [warm, cosine], [plan.warmup])
    model.train()
    start = time.time()
    for step in range(plan.steps):
        length = LENGTHS[step % len(LENGTHS)]
        ids, weights = rows(plan.tokens_per_step // length, length)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == plan.steps - 1:
            print(f"{name} step {step} loss {loss:.4f} {time.time() - start:.0f} s", flush=True)


def build_base(seed: int) -> None:
    """Train the base from scratch and write it with its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = demo_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    train(model, base_rows(tokenizer, seed), BASE_SCHEDULE, name="base")
    folder = ASSETS / "base"
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _edit_json(folder / "config.json", _name_or_path=BASE_NAME)


def build_expert(name: str) -> None:
    """Train one LoRA on the saved base and write it as an ordinary PEFT folder."""
    recipe = RECIPES[name]
    torch.manual_seed(recipe.seed)
    base = LlamaForCausalLM.from_pretrained(ASSETS / "base", dtype=torch.float32)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        use_rslora=recipe.use_rslora,
        target_modules=recipe.targets,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    rows = expert_rows(demo_tokenizer(), name, recipe.seed)
    train(model, rows, EXPERT_SCHEDULE, name=name)
    folder = ASSETS / "experts" / name
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # a template with nothing filled in
    _edit_json(folder / "adapter_config.json", base_model_name_or_path=BASE_NAME)


def _edit_json(path: Path, **values: str) -> None:
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Build what the command line names."""
    parser = argparse.ArgumentParser(description="Rebuild the demo's assets.")
    parser.add_argument("what", choices=("base", "experts"))
    parser.add_argument("--only", nargs="+", default=EXPERTS, choices=EXPERTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "base":
        build_base(seed=0)
    else:
        for name in arguments.only:
            build_expert(name)


if __name__ == "__main__":
    main()
