"""A base model without weights, and what its weights will weigh once they are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from ..errors import PeftMoeError, near_matches

# bitsandbytes: values per scale, and scales per second scale under double quantisation.
BLOCK, BLOCK_OF_SCALES = 64, 256
PRECISIONS = ("full", "nf4", "fp4", "int8")


@dataclass(frozen=True)
class Precision:
    """How the base's linear layers are kept: "full", bitsandbytes "nf4", "fp4" or "int8"."""

    name: str = "full"
    double_quant: bool = False

    def __post_init__(self) -> None:
        if self.name not in PRECISIONS:
            near = near_matches(self.name, PRECISIONS)
            raise PeftMoeError(f"precision={self.name!r} is none of {', '.join(PRECISIONS)}.{near}")

    def bytes_of(self, weight: Tensor) -> int:
        """What a linear layer's weight takes, its scales included."""
        numbers = weight.numel()
        if self.name == "int8":
            return numbers + 4 * weight.shape[0]
        if self.name == "full":
            return numbers * weight.element_size()
        scales = -(-numbers // BLOCK)
        if not self.double_quant:
            return numbers // 2 + 4 * scales
        return numbers // 2 + scales + 4 * (-(-scales // BLOCK_OF_SCALES))


class _Dequantised(torch.autograd.Function):
    """A product with a weight that is unpacked for it, forward and backward, and thrown away."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.weight = weight_OI
        return x @ torch.empty_like(weight_OI, dtype=x.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ torch.empty_like(ctx.weight, dtype=grads[0].dtype), None


class _EightBit(_Dequantised):
    """LLM.int8 besides: the input is rounded to 8 bits on the way, and kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.weight, ctx.x = weight_OI, x
        rounded = x.to(torch.float16).to(torch.int8)
        product = torch.empty(*x.shape[:-1], weight_OI.shape[0], dtype=torch.int32)
        del rounded
        return product.to(x.dtype)


class QuantisedLinear(nn.Linear):
    """Stands for a bitsandbytes layer where only memory is wanted."""

    precision = Precision("nf4")

    def forward(self, input: Tensor) -> Tensor:
        """As bitsandbytes: the weight is unpacked to the input's dtype, nothing else is kept."""
        product: Any = _EightBit if self.precision.name == "int8" else _Dequantised
        x = input
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        out: Tensor = product.apply(x, self.weight)
        return out if self.bias is None else out + self.bias.to(out.dtype)


def find_config(base: str | PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a base: itself, or read from a folder or the Hub (``config.json`` alone)."""
    if isinstance(base, PreTrainedConfig):
        return base
    try:
        return AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise PeftMoeError(
            f"base={base!r}: its config.json cannot be read: {error}; give a folder or a Hub id of a causal "
            "language model"
        ) from error


def precision_of(config: PreTrainedConfig, wanted: str | None, double_quant: bool) -> Precision:
    """What was asked for, or what the base is stored in.

    Raises:
        PeftMoeError: an unknown word, or a base that was quantised by something else than bitsandbytes.
    """
    stored: Any = getattr(config, "quantization_config", None)
    if stored is None:
        return Precision(wanted or "full", double_quant)
    values = stored if isinstance(stored, dict) else stored.to_dict()
    if values.get("load_in_4bit"):
        return Precision(
            values.get("bnb_4bit_quant_type", "fp4"), bool(values.get("bnb_4bit_use_double_quant"))
        )
    if values.get("load_in_8bit"):
        return Precision("int8")
    raise PeftMoeError(
        f"this base is stored in {values.get('quant_method')!r}, whose memory is not modelled; plan for "
        "bitsandbytes nf4 (4 bits) or int8 (8 bits) on the unquantised base instead"
    )


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype, precision: Precision) -> nn.Module:
    """The base on "meta": its modules, no memory.

    Raises:
        PeftMoeError: no causal language model has this configuration.
    """
    if hasattr(config, "quantization_config"):
        config = type(config).from_dict({**config.to_dict(), "quantization_config": None})
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]  # untyped, transformers'
    except ValueError as error:
        raise PeftMoeError(
            f"model_type={config.model_type!r} is no causal language model, the only kind that memory can be "
            "planned for"
        ) from error
    model.tie_weights()  # type: ignore[operator]  # transformers' own
    if precision.name != "full":
        skipped = get_keys_to_not_convert(model)
        for name, module in model.named_modules():
            linear = type(module) is nn.Linear or isinstance(module, Conv1D)
            if linear and should_convert_module(name, skipped):
                model.set_submodule(name, _quantised(module, precision))
    return model


def _quantised(module: Any, precision: Precision) -> nn.Module:
    outputs, inputs = module.weight.shape[:: -1 if isinstance(module, Conv1D) else 1]
    bias = module.bias is not None
    linear = QuantisedLinear(inputs, outputs, bias=bias, device="meta", dtype=module.weight.dtype)
    linear.precision = precision
    return linear.requires_grad_(False)


def weigh(model: nn.Module) -> dict[str, int]:
    """Bytes of a base's weights: "quantised" and "other weights"; shared ones count once."""
    found = {"quantised": 0, "other weights": 0}
    seen: set[int] = set()
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if isinstance(module, QuantisedLinear) and name == "weight":
                found["quantised"] += module.precision.bytes_of(tensor)
            else:
                found["other weights"] += tensor.numel() * tensor.element_size()
    return found
