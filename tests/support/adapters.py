"""Real LoRA adapters, trained by nobody: PEFT makes and saves them, their numbers are random."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from .bases import BASES, make_base

# Large enough that an adapter moves the outputs far beyond every tolerance of these tests.
STD = 0.08


@dataclass(frozen=True)
class Recipe:
    """What an adapter is made of; ``targets`` are "attention", "mlp" or "all"."""

    targets: str
    seed: int
    lora: dict[str, Any] = field(default_factory=dict)


# Ranks, scales and targets all differ: some experts are absent from some layers.
RECIPES: dict[str, Recipe] = {
    "wide": Recipe("all", 1, {"r": 4, "lora_alpha": 8}),
    "narrow": Recipe("attention", 2, {"r": 3, "lora_alpha": 4, "use_rslora": True}),
    "upper": Recipe("all", 3, {"r": 6, "lora_alpha": 3, "layers_to_transform": [1, 2]}),
}


def randomise(model: nn.Module, seed: int) -> None:
    """Give every LoRA factor numbers of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * STD)


def lora_config(architecture: str, recipe: Recipe) -> LoraConfig:
    """The ``LoraConfig`` of a recipe."""
    arch = BASES[architecture]
    names = {"all": arch.linears, "attention": list(arch.attention), "mlp": list(arch.mlp)}
    lora = dict(recipe.lora)
    if arch.kind == "seq2seq" and "layers_to_transform" in lora:
        lora["layers_to_transform"] = [1]
    return LoraConfig(target_modules=names[recipe.targets], task_type=arch.task_type, **lora)


def make_adapter(architecture: str, folder: Path, recipe: Recipe, dtype: torch.dtype = torch.float32) -> str:
    """Save one adapter with PEFT and return its folder."""
    model = get_peft_model(make_base(architecture), lora_config(architecture, recipe))
    randomise(model, recipe.seed)
    model.to(dtype).save_pretrained(str(folder))
    return str(folder)
