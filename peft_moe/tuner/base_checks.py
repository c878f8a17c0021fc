"""A backend that can serve no call of a model is refused before the model is touched."""

from __future__ import annotations

import torch
from torch import nn

from ..ops import CallSpec, RankMap, choose
from .config.mixture import MoLoraConfig


def refuse_unfit_backend(config: MoLoraConfig, model: nn.Module) -> None:
    """Ask the backend about the easiest call that this config can lead to: one token, without gradients.

    What only the layers and the calls know (sizes, unequal ranks, training) is refused when they come.

    Raises:
        PeftMoeError: with the backend's reason.
    """
    if config.backend == "auto":
        return
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    settings = config.router_settings()
    chooses = settings.is_sparse and settings.topk_method == "greedy"
    experts = settings.num_experts
    spec = CallSpec(
        tokens=1,
        in_features=16,
        out_features=16,
        ranks=RankMap((16,) * experts, (1.0,) * experts),
        chosen=(settings.top_k or 1) + len(settings.shared) if chooses else None,
        # A decision per token is one row of gates only by chance: in a step of one sequence.
        one_row=not config.scorer.reads_input or settings.granularity != "token",
        dtype=torch.float32 if weight is None else weight.dtype,
        device="cpu" if weight is None or weight.is_meta else weight.device.type,
        trains=frozenset(),
        compiling=False,
    )
    choose(spec, config.backend)
