"""Where a server computes something else from the same files; read in the sources of vLLM and llama.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import NativePlan


def half_open(hidden: int, dtype: torch.dtype) -> Tensor:
    """Weights [1, H] of a shared expert's gate whose sigmoid is 1/2 to float32.

    Not zeros: llama.cpp computes the sigmoid of s as silu(s)/s.

    Args:
        hidden: H.
        dtype: that they are written in; float16 holds nothing below 2^-24.
    """
    return torch.full((1, hidden), 2.0 ** (-23 if dtype == torch.float16 else -30))


def server_notes(plan: NativePlan) -> list[str]:
    """What a user of a server should know of this very model; transformers computes all of it."""
    config, found = plan.base_config, []
    if plan.kind == "qwen2-moe" and plan.norm and plan.top_k < len(plan.routed):
        found.append(
            "llama.cpp does not divide the kept weights of a Qwen2-MoE by their sum, as this one asks"
        )
    if plan.kind == "qwen2-moe" and config.tie_word_embeddings:
        found.append("llama.cpp takes no Qwen2-MoE with tied embeddings")
    if plan.kind != "mixtral" and len(plan.gates) < plan.layers:
        found.append("llama.cpp takes no Qwen MoE with layers that have no experts")
    if config.hidden_act != "silu":
        found.append(f"vLLM and llama.cpp compute silu, and this base has {config.hidden_act}")
    windows = plan.kind == "qwen2-moe" and "sliding_attention" in (config.layer_types or [])
    if windows:
        found.append(
            "vLLM and llama.cpp have no windows in Qwen2-MoE, and layers of this base look through one"
        )
    return [f"Servers: {reason}." for reason in found]
