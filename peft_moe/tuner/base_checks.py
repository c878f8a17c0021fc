"""Checks of a base before a mixture is injected: a backend that can serve it, 4-bit layers that can train.

On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a 4-bit weight in its first evaluation pass. After that,
no gradient flows through the layer to the layers below it, without any message, and saving the model unpacks
some weights wrongly. A training run evaluates and saves many times, so :func:`keep_unpacked` switches the
repacking off. This makes evaluation passes of a mixture on these CPUs slower.
"""

from __future__ import annotations

import torch
from torch import nn

from ..errors import PeftMoeError
from ..ops import CallSpec, RankMap, choose
from .config.mixture import MoLoraConfig


def refuse_unfit_backend(config: MoLoraConfig, model: nn.Module) -> None:
    """Refuse a backend that can serve no call of this config, before the model is touched.

    The backend is asked about the easiest call: one token, without gradients. Facts that only layers and
    calls know (sizes, unequal ranks, training) are checked at the call.

    Raises:
        PeftMoeError: the backend refuses the call; the message holds its reason.
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
        # A decision per token gives one row of gates only in a decoding step of one sequence.
        one_row=not config.scorer.reads_input or settings.granularity != "token",
        dtype=torch.float32 if weight is None else weight.dtype,
        device="cpu" if weight is None or weight.is_meta else weight.device.type,
        trains=frozenset(),
        compiling=False,
    )
    choose(spec, config.backend)


def keep_unpacked(model: nn.Module, *, trains: bool) -> None:
    """Switch bitsandbytes' repacking off in every 4-bit layer, also in layers without experts.

    Args:
        model: the base.
        trains: whether the mixture will train; inference works with a weight that is already repacked.

    Raises:
        PeftMoeError: a layer is already repacked, and the mixture will train.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if trains and getattr(state, "packing_format_for_cpu", False):
            raise PeftMoeError(
                f"{name}: an eval pass on this CPU has repacked its 4-bit weight, which stops all gradients "
                "below it; load the base again and add the mixture before the first pass"
            )
