"""Rebuild the demo's assets from nothing: the tokenizer, the base model, and its LoRA experts.

    python recipes/demo/build_assets.py base            # about 45 minutes on one core
    python recipes/demo/build_assets.py experts         # about 5 minutes per expert
    python recipes/demo/build_assets.py experts --only reverse roman
    python recipes/demo/measure.py                      # prints what the assets can do

Run them from the repository's root. Memory stays below 2 GB. The base's last loss is about 0.2
(answers, and lightly weighted the questions, whose arguments cannot be guessed), an expert's
below 0.03. Weights are written in bfloat16 into peft_moe/cli/demo/assets.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from loop import Schedule, train
from peft import LoraConfig, get_peft_model
from rows import base_rows, expert_rows
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import peft_moe.cli.demo
from peft_moe.cli.demo import BASE_NAME
from peft_moe.cli.demo.skills import EXPERTS
from peft_moe.cli.demo.tokenizer import demo_tokenizer

ASSETS = Path(peft_moe.cli.demo.__file__).parent / "assets"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEARS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


# The base is trained on all its skills evenly, then with the slow ones more often.
BASE_SCHEDULES = (
    Schedule(1400, 2.0e-3, warmup=100, weight_decay=0.05, tokens_per_step=4096),
    Schedule(1200, 1.2e-3, warmup=50, weight_decay=0.05, tokens_per_step=2048),
    Schedule(600, 1.0e-3, warmup=20, weight_decay=0.05, tokens_per_step=2048),
    Schedule(1000, 1.2e-3, warmup=20, weight_decay=0.05, tokens_per_step=2048),
)
SLOW_SHARES = (0.0, 0.5, 0.5, 0.4)
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


def build_base(first_phase: int) -> None:
    """Train the base from scratch, or go on with the saved one, and write it."""
    tokenizer = demo_tokenizer()
    folder = ASSETS / BASE_NAME
    for phase in range(first_phase, len(BASE_SCHEDULES)):
        torch.manual_seed(phase)
        if phase == 0:
            model = LlamaForCausalLM(_base_config(tokenizer))
        else:
            model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        rows = base_rows(tokenizer, phase, SLOW_SHARES[phase])
        train(model, rows, BASE_SCHEDULES[phase], name=f"base, phase {phase}")
        model.to(torch.bfloat16).save_pretrained(folder)
        (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    _edit_json(folder / "config.json", _name_or_path=BASE_NAME)


def _base_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
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


def build_expert(name: str) -> None:
    """Train one LoRA on the saved base and write it as an ordinary PEFT folder."""
    recipe = RECIPES[name]
    torch.manual_seed(recipe.seed)
    base = LlamaForCausalLM.from_pretrained(ASSETS / BASE_NAME, dtype=torch.float32)
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
    (folder / "adapter_model.safetensors").chmod(0o644)
    _edit_json(folder / "adapter_config.json", base_model_name_or_path=BASE_NAME)


def _edit_json(path: Path, **values: str) -> None:
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Build what the command line names."""
    parser = argparse.ArgumentParser(description="Rebuild the demo's assets.")
    parser.add_argument("what", choices=("base", "experts"))
    parser.add_argument("--phase", type=int, default=0, help="go on with the base at this phase")
    parser.add_argument("--only", nargs="+", default=EXPERTS, choices=EXPERTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "base":
        build_base(arguments.phase)
    else:
        for name in arguments.only:
            build_expert(name)


if __name__ == "__main__":
    main()
