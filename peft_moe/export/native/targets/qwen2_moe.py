"""Qwen2-MoE: any layers, gates that may sum to less than 1, and a shared expert with a sigmoid gate."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2MoeConfig

from ..target import Layout, NativeTarget, register_target


class QwenMoeTarget(NativeTarget):
    """What the Qwen MoE architectures have in common."""

    def config_fields(self, layout: Layout) -> dict[str, Any]:
        """Sizes, normalisation of the gates, and the layers without experts."""
        return {
            **super().config_fields(layout),
            "num_experts": layout.experts,
            "moe_intermediate_size": layout.expert_size,
            "norm_topk_prob": layout.norm,
            "decoder_sparse_step": 1,
            "mlp_only_layers": layout.unmixed,
        }

    def server_notes(self, layout: Layout) -> list[str]:
        """llama.cpp reads no layers without experts."""
        notes = ["llama.cpp takes no Qwen MoE with layers that have no experts"] if layout.unmixed else []
        return notes + super().server_notes(layout)


@register_target
class Qwen2MoeTarget(QwenMoeTarget):
    """Qwen2-MoE, from Qwen2."""

    name = "qwen2-moe"
    title = "Qwen2-MoE"
    base_types = ("qwen2",)
    config_class = Qwen2MoeConfig
    architecture = "Qwen2MoeForCausalLM"
    shared_expert = "shared_expert"

    def config_fields(self, layout: Layout) -> dict[str, Any]:
        """The shared expert's size, and Qwen2's biases of the attention."""
        return {
            **super().config_fields(layout),
            "shared_expert_intermediate_size": layout.shared_size,
            "qkv_bias": True,
        }

    def server_notes(self, layout: Layout) -> list[str]:
        """Normalised gates, tied embeddings and windows differ."""
        config, notes = layout.base_config, []
        if layout.norm and layout.top_k < layout.experts:
            notes.append(
                "llama.cpp does not divide the kept weights of a Qwen2-MoE by their sum, as this one asks"
            )
        if config.tie_word_embeddings:
            notes.append("llama.cpp takes no Qwen2-MoE with tied embeddings")
        notes += super().server_notes(layout)
        if "sliding_attention" in (config.layer_types or []):
            notes.append(
                "vLLM and llama.cpp have no windows in Qwen2-MoE, and layers of this base look through one"
            )
        return notes
