"""Which base a mixture was made on: its sizes, some of its weights and its quantisation, kept in the config.

The names and shapes of the adapted layers are the same in a deeper base and in another model of the same
architecture. The weights differ. They are compared at the precision of bfloat16, so that a base may be loaded
in any dtype. The quantisation matters because a router reads the base's hidden states, which depend on it.
"""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import PeftMoeError
from ...experts.base_modules import base_modules

if TYPE_CHECKING:
    from ..config.mixture import MoLoraConfig

# Of transformers' configs, by their common names.
_SIZES = ("model_type", "num_hidden_layers", "hidden_size")
_NUMBERS = 8  # values per tensor
_VECTORS, _MATRICES = 2, 3  # tensors of either kind, spread over the model
# Heads and poolers may be initialised at random at every load; the layers of a stack are not.
_IN_A_STACK = re.compile(r"\.\d+\.")
# Rounding to bfloat16 moves a number by 2^-9 of itself at most; a load in float16 by 3e-8 near zero.
_RELATIVE, _ABSOLUTE = 2.0**-8, 1e-6


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return plain JSON data that identifies a base.

    Args:
        model: the base, bare or with adapters in it.

    Returns:
        The sizes of its text model and its vocabulary where it has them, and ``values``: some numbers of a
        few normalisation weights and matrices in the stack of layers, by tensor name. Tensors that are
        packed, empty or split between processes are left out.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    data = {name: value for name in _SIZES if (value := getattr(text, name, None)) is not None}
    rows = _vocabulary(model)
    if rows is not None:
        data["vocabulary"] = rows
    # A module without a config is no pretrained model, so its weights are not the same at the next load.
    tensors = _plain_weights(model) if "model_type" in data else {}
    vectors = [name for name, tensor in tensors.items() if tensor.dim() == 1]
    matrices = [name for name, tensor in tensors.items() if tensor.dim() == 2]
    chosen = [*_spread(vectors, _VECTORS), *_spread(matrices, _MATRICES)]
    data["values"] = {name: _numbers(tensors[name]) for name in chosen}
    return data


def describe_precision(model: nn.Module) -> str:
    """Return how the base's weights are stored: "full", or quantiser and kind ("bitsandbytes nf4")."""
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


def record_base(config: MoLoraConfig, model: nn.Module) -> None:
    """Write the base of a new mixture into its config; compare that of a loaded one with the base here.

    Raises:
        PeftMoeError: the bases differ, and ``allow_base_mismatch`` is not set.
    """
    saved = config.base_fingerprint
    if saved is None:
        config.base_fingerprint = fingerprint(model)
        return
    if config.allow_base_mismatch:
        return
    here = fingerprint(model)
    for name in (*_SIZES, "vocabulary"):
        if name in saved and name in here and saved[name] != here[name]:
            resize = f"; if tokens were added, call resize_token_embeddings({saved[name]}) on the base first"
            raise _refusal(
                f"base_fingerprint.{name} is {saved[name]!r}, and this base has {here[name]!r}",
                resize if name == "vocabulary" else "",
            )
    # Quantisation changes a matrix, also one that is unpacked later.
    unquantised = {"full", config.base_precision or "full"} == {describe_precision(model)}
    check_base_values(saved, _plain_weights(model), matrices=unquantised)


def record_base_precision(config: MoLoraConfig, model: nn.Module) -> None:
    """Write the base's precision into the config, and warn if the mixture was saved on another one."""
    precision, saved = describe_precision(model), config.base_precision
    if saved is not None and saved != precision:
        warnings.warn(
            f"this mixture was made on a base with weights in {saved!r}, and this base has {precision!r}: "
            "its hidden states differ a little, and with them the router's decisions; compare the quality, "
            "or train the router again on this base",
            stacklevel=2,
        )
    config.base_precision = precision


def check_base_values(saved: dict[str, Any], tensors: dict[str, Tensor], *, matrices: bool) -> None:
    """Compare the numbers of a base with those of a fingerprint.

    Args:
        saved: from :func:`fingerprint`.
        tensors: tensors of the base by name; a name that is missing is not compared.
        matrices: whether matrices are compared too, which needs that neither base was quantised.

    Raises:
        PeftMoeError: they differ.
    """
    for name, recorded in saved.get("values", {}).items():
        tensor = tensors.get(name)
        if tensor is None or (tensor.dim() > 1 and not matrices):
            continue
        numbers = _numbers(tensor)
        if len(numbers) != len(recorded) or not all(map(_close, recorded, numbers)):
            raise _refusal(
                f"{name} of the base begins with {numbers[0]}, where base_fingerprint has {recorded[0]}, "
                "or differs further on",
                "",
            )


def _refusal(difference: str, fix: str) -> PeftMoeError:
    return PeftMoeError(
        f"the mixture was made on another base: {difference}; load the base that it was made on{fix}; to use "
        "this base all the same, set allow_base_mismatch=True in its config"
    )


def _vocabulary(model: Any) -> int | None:
    try:
        rows = model.get_input_embeddings().weight.shape[0]
    except (AttributeError, NotImplementedError, IndexError):
        return None
    return int(rows) or None


def _plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights whose numbers can be read directly, sorted by name."""
    weights = {}
    for name, module in base_modules(model).items():
        weight = module._parameters.get("weight") if _IN_A_STACK.search(f"{name}.") else None
        # Biases may train; packed, sharded and traced weights are subclasses, or no floats, or empty.
        if weight is None or type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
            continue
        if weight.is_floating_point() and weight.element_size() > 1 and weight.numel() and not weight.is_meta:
            weights[f"{name}.weight"] = weight.detach()
    return dict(sorted(weights.items()))


def _spread(names: list[str], count: int) -> list[str]:
    """Return ``count`` of the names at even distances, including the first and the last."""
    steps = [round(i * (len(names) - 1) / max(1, count - 1)) for i in range(count)] if names else []
    return [names[step] for step in sorted(set(steps))]


def _numbers(tensor: Tensor) -> list[float]:
    flat, count = tensor.reshape(-1), min(_NUMBERS, tensor.numel())
    # Even steps over the flat tensor, mostly no multiples of a row's length: several columns are read.
    indices = torch.tensor([i * (tensor.numel() - 1) // max(1, count - 1) for i in range(count)])
    return [float(f"{value:.6g}") for value in flat[indices.to(flat.device)].float().tolist()]


def _close(a: float, b: float) -> bool:
    return a == b or abs(a - b) <= _RELATIVE * max(abs(a), abs(b)) + _ABSOLUTE
