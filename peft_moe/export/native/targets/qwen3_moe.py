"""Qwen3-MoE: any layers, no shared expert, one kind of attention for all layers."""

from __future__ import annotations

from typing import Any

from transformers import Qwen3MoeConfig

from ..target import register_target
from .qwen2_moe import QwenMoeTarget


@register_target
class Qwen3MoeTarget(QwenMoeTarget):
    """Qwen3-MoE, from Qwen3."""

    name = "qwen3-moe"
    title = "Qwen3-MoE"
    base_types = ("qwen3",)
    config_class = Qwen3MoeConfig
    architecture = "Qwen3MoeForCausalLM"

    def base_obstacles(self, base_config: Any, biases: list[str]) -> list[str]:
        """Qwen3-MoE has windows in all layers or in none."""
        reasons = super().base_obstacles(base_config, biases)
        if len(set(getattr(base_config, "layer_types", None) or [])) > 1:
            reasons.append(
                "some layers of the base look through a window and others do not, in Qwen3-MoE all do"
            )
        return reasons
