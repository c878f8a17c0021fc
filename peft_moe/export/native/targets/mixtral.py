"""Mixtral: experts in every layer, gates that sum to 1, no shared expert, no biases."""

from __future__ import annotations

from typing import Any

from transformers import MixtralConfig

from ..target import Layout, NativeTarget, register_target


@register_target
class MixtralTarget(NativeTarget):
    """Mixtral, from Llama and Mistral."""

    name = "mixtral"
    title = "Mixtral"
    base_types = ("llama", "mistral")
    config_class = MixtralConfig
    architecture = "MixtralForCausalLM"
    experts_module = "block_sparse_moe"
    linears = ("w1", "w3", "w2")
    unmixed_layers = False

    def config_fields(self, layout: Layout) -> dict[str, Any]:
        """Mixtral has no further size: its experts are as large as the config's ``intermediate_size``."""
        return {**super().config_fields(layout), "num_local_experts": layout.experts}

    def base_obstacles(self, base_config: Any, biases: list[str]) -> list[str]:
        """Mixtral's attention has no biases either."""
        return [f"the base has biases ({biases[0]}), and Mixtral has none"] if biases else []
