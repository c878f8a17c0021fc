"""One place that makes and remembers tiny bases, their adapters, and mixtures of them."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_moe import MoLoraConfig

from .adapters import RECIPES, Recipe, make_adapter
from .bases import BASES, make_base
from .routing import ROUTINGS, set_routers


class Zoo:
    """Bases are copied on the way out; adapters are saved once per run of the tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._bases: dict[str, nn.Module] = {}

    def base(self, architecture: str) -> nn.Module:
        """A fresh copy of the base, in eval mode."""
        if architecture not in self._bases:
            self._bases[architecture] = make_base(architecture)
        return copy.deepcopy(self._bases[architecture])

    def saved_base(self, architecture: str) -> str:
        """A folder that ``from_pretrained`` reads."""
        folder = self.folder / architecture / "base"
        if not folder.exists():
            self.base(architecture).save_pretrained(str(folder))
        return str(folder)

    def experts(self, architecture: str) -> dict[str, str]:
        """Name to folder of three adapters of unequal rank, scale and reach."""
        return {name: self.adapter(architecture, name, recipe) for name, recipe in RECIPES.items()}

    def adapter(
        self, architecture: str, name: str, recipe: Recipe, dtype: torch.dtype = torch.float32
    ) -> str:
        """The folder of one adapter, made on first use."""
        folder = self.folder / architecture / name
        return str(folder) if folder.exists() else make_adapter(architecture, folder, recipe, dtype)

    def lora(self, architecture: str, expert: str, base: nn.Module | None = None) -> PeftModel:
        """The base with one of the experts, by PEFT alone: what a mixture is measured against."""
        base = self.base(architecture) if base is None else base
        return PeftModel.from_pretrained(base, self.experts(architecture)[expert]).eval()

    def mixture(
        self,
        architecture: str,
        routing: str = "dense",
        *,
        base: nn.Module | None = None,
        seed: int | None = None,
        **fields: Any,
    ) -> PeftModel:
        """The three experts under one of the routings, with router weights set at random."""
        fields = {"experts": self.experts(architecture), **ROUTINGS[routing], **fields}
        config = MoLoraConfig(task_type=BASES[architecture].task_type, **fields)
        model = get_peft_model(self.base(architecture) if base is None else base, config).eval()
        set_routers(model, BASES[architecture].router_seed if seed is None else seed)
        return model


def silence_below_tap(lora: nn.Module, mixture: PeftModel, architecture: str) -> None:
    """Zero a plain LoRA wherever the mixture leaves the base unadapted (``router_below_tap="base"``)."""
    config = mixture.peft_config["default"]
    if config.router_scope != "model" or config.router_below_tap != "base":
        return
    pattern = re.compile(BASES[architecture].layer)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            found = pattern.search(name)
            tower = BASES[architecture].reads == "both" and "language_model" not in name
            if "lora_B" in name and (tower or (found and int(found[1]) < config.router_tap)):
                parameter.zero_()
