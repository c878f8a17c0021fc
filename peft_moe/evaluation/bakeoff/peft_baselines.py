"""PEFT's own mixtures of adapters: Arrow and X-LoRA, with what each of them insists on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftModel, XLoraConfig, get_peft_model
from torch import nn

from ...errors import PeftMoeError


def arrow(base: nn.Module, experts: Mapping[str, str], fields: Mapping[str, Any]) -> PeftModel:
    """PEFT's Arrow (arXiv 2405.11157) over all experts; nothing is fitted or trained.

    Raises:
        ValueError: ranks, shapes or targets differ.
    """
    from peft.tuners.lora.arrow import create_arrow_model
    from peft.tuners.lora.config import ArrowConfig

    given = {"rng_seed": 0, **fields}
    given["top_k"] = min(given.get("top_k", 3), len(experts))
    model: PeftModel = create_arrow_model(
        base,  # type: ignore[arg-type]
        list(experts.values()),
        ArrowConfig(**given),
    )
    return model


def xlora(base: nn.Module, experts: Mapping[str, str], fields: Mapping[str, Any]) -> PeftModel:
    """PEFT's X-LoRA (arXiv 2402.07148) over all experts, its classifier untrained.

    Raises:
        PeftMoeError: something beside the classifier would train.
    """
    # PEFT's rules: no cache, and adapters named by their numbers.
    base.config.use_cache = False  # type: ignore[union-attr]
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=base.config.get_text_config().hidden_size,  # type: ignore[operator, union-attr]
        adapters={str(number): source for number, source in enumerate(experts.values())},
        **fields,
    )
    model: PeftModel = get_peft_model(base, config)  # type: ignore[assignment, arg-type]
    strangers = [n for n, p in model.named_parameters() if p.requires_grad and "xlora_classifier" not in n]
    if strangers:
        raise PeftMoeError(f"X-LoRA would train {strangers[0]} beside its classifier")
    return model
