"""Which quantisation a mixture was made on: a router reads the base's hidden states, which depend on it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from ..config.mixture import MoLoraConfig


def describe_precision(model: nn.Module) -> str:
    """How the base's weights are kept: "full", or the quantiser and its kind ("bitsandbytes nf4")."""
    quantization: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if quantization is None:
        return "full"
    values = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = str(getattr(values.get("quant_method"), "value", values.get("quant_method")))
    if values.get("load_in_4bit"):
        return f"{method} {values.get('bnb_4bit_quant_type', '4bit')}"
    if values.get("load_in_8bit"):
        return f"{method} int8"
    bits = values.get("bits")
    return f"{method} {bits} bits" if bits else method


def record_base_precision(config: MoLoraConfig, model: nn.Module) -> None:
    """Write the base's precision into the config; warn where the mixture was saved on another one."""
    found, saved = describe_precision(model), config.base_precision
    if saved is not None and saved != found:
        warnings.warn(
            f"this mixture was made on a base with weights in {saved!r}, and this base has {found!r}: its "
            "hidden states differ a little, and with them the router's decisions; compare the quality, or "
            "train the router again on this base",
            stacklevel=2,
        )
    config.base_precision = found
