"""A tiny decoder on disk with a tokenizer, adapters of it, and full models that were trained from it."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from peft_moe.cli.demo import BASE_NAME, asset_path

from .adapters import randomise


def tokenizer():
    """Characters, as the demo's."""
    return AutoTokenizer.from_pretrained(asset_path(BASE_NAME))


def save_base(folder: Path) -> str:
    """A base with its tokenizer."""
    words = tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=words.pad_token_id, bos_token_id=None,
        eos_token_id=words.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(str(folder))
    words.save_pretrained(str(folder))
    return str(folder)


def load_base(folder: str) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder).eval()


def save_adapter(base: str, folder: Path, seed: int, **lora) -> str:
    """An adapter with numbers of its own."""
    how = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj", "down_proj"], **lora}
    model = get_peft_model(load_base(base), LoraConfig(task_type="CAUSAL_LM", **how))
    randomise(model, seed)
    model.save_pretrained(str(folder))
    return str(folder)


def save_full(base: str, folder: Path, seed: int, **lora) -> str:
    """A full model: the base with such an adapter merged into it."""
    adapter = save_adapter(base, folder.with_suffix(".lora"), seed, **lora)
    PeftModel.from_pretrained(load_base(base), adapter).merge_and_unload().save_pretrained(str(folder))
    return str(folder)
