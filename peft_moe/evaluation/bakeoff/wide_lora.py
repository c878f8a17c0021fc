"""The rival without experts: one LoRA of all their ranks, trained on all their data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from ...errors import PeftMoeError
from .merges import widest_rank


def wide_lora(base: nn.Module, experts: Mapping[str, str], fields: Mapping[str, Any]) -> PeftModel:
    """A fresh LoRA with the sum of the experts' ranks and the union of their targets.

    It is scaled as the experts are on average, alpha/rank or alpha/√rank each.

    Args:
        base: a fresh copy.
        experts: name → adapter, of which only the configs are read.
        fields: of ``LoraConfig``, to override.

    Raises:
        PeftMoeError: an expert is no LoRA, or targets are given as patterns that cannot be united.
    """
    configs = [PeftConfig.from_pretrained(source) for source in experts.values()]
    loras = [config for config in configs if isinstance(config, LoraConfig)]
    if len(loras) < len(configs):
        raise PeftMoeError("one wide LoRA needs experts that are LoRA adapters")
    rank = sum(widest_rank(config) for config in loras)
    scalings = [c.lora_alpha / (c.r**0.5 if c.use_rslora else c.r) for c in loras]
    config = LoraConfig(
        **{
            "r": rank,
            "lora_alpha": rank * sum(scalings) / len(scalings),
            "target_modules": sorted(_targets(loras)),
            "task_type": "CAUSAL_LM",
            **fields,
        }
    )
    model: PeftModel = get_peft_model(base, config)  # type: ignore[assignment, arg-type]
    return model


def _targets(configs: Iterable[LoraConfig]) -> set[str]:
    union: set[str] = set()
    for config in configs:
        if config.target_modules is None or isinstance(config.target_modules, str):
            raise PeftMoeError(
                f"target_modules={config.target_modules!r} cannot be united with others; give the wide "
                "LoRA its own: {width: {target_modules: […]}}"
            )
        union |= set(config.target_modules)
    return union
