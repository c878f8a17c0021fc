"""Which base a mixture was made on: its size, and a few of its numbers, kept in the mixture's config.

Names and shapes of the adapted layers do not tell a base from a deeper one of the same names, nor from
another model of the same architecture. The numbers do: they are compared as bfloat16 would leave them, so
that the dtype in which a base is loaded is free.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import PeftMoeError
from ...experts.base_modules import base_modules
from .base_precision import describe_precision

if TYPE_CHECKING:
    from ..config.mixture import MoLoraConfig

# Of transformers' configs, by their common names.
_SIZES = ("model_type", "num_hidden_layers", "hidden_size")
_NUMBERS = 8  # per tensor
_VECTORS, _MATRICES = 2, 3  # tensors of either kind, spread over the model
# Heads and poolers may be drawn anew at every load; what lies in a stack of layers is not.
_IN_A_STACK = re.compile(r"\.\d+\.")
# Rounding to bfloat16 moves a number by 2^-9 of itself at most; a load in float16 by 3e-8 near zero.
_RELATIVE, _ABSOLUTE = 2.0**-8, 1e-6


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Plain JSON data about a base, bare or with adapters in it.

    Returns:
        The sizes of its text model and its vocabulary where it has them, and ``values``: by tensor name some
        numbers of normalisation weights and of matrices in the stack of layers. Tensors that are packed,
        empty or split between processes are left out.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = {name: value for name in _SIZES if (value := getattr(text, name, None)) is not None}
    rows = _vocabulary(model)
    if rows is not None:
        found["vocabulary"] = rows
    # A module without a config has no weights of its own that one could load again.
    tensors = _plain_weights(model) if "model_type" in found else {}
    vectors = [name for name, tensor in tensors.items() if tensor.dim() == 1]
    matrices = [name for name, tensor in tensors.items() if tensor.dim() == 2]
    chosen = [*_spread(vectors, _VECTORS), *_spread(matrices, _MATRICES)]
    found["values"] = {name: _numbers(tensors[name]) for name in chosen}
    return found


def record_base(config: MoLoraConfig, model: nn.Module) -> None:
    """Write a new mixture's base into its config; hold a loaded one's against the base it is loaded on.

    Raises:
        PeftMoeError: it is another base, and ``allow_base_mismatch`` is not set.
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
    # Numbers of a matrix that was packed once are others, whatever they are kept in now.
    whole = {"full", config.base_precision or "full"} == {describe_precision(model)}
    check_base_values(saved, _plain_weights(model), whole=whole)


def check_base_values(saved: dict[str, Any], tensors: dict[str, Tensor], *, whole: bool) -> None:
    """Hold a base's numbers against those of a fingerprint.

    Args:
        saved: from :func:`fingerprint`.
        tensors: of the base, by name; what is not there is not compared.
        whole: whether matrices are compared too: neither side was packed.

    Raises:
        PeftMoeError: they differ.
    """
    for name, wanted in saved.get("values", {}).items():
        tensor = tensors.get(name)
        if tensor is None or (tensor.dim() > 1 and not whole):
            continue
        numbers = _numbers(tensor)
        if len(numbers) != len(wanted) or not all(map(_close, wanted, numbers)):
            raise _refusal(
                f"{name} of the base begins with {numbers[0]}, where base_fingerprint has {wanted[0]}, "
                "or differs further on",
                "",
            )


def _refusal(what: str, fix: str) -> PeftMoeError:
    return PeftMoeError(
        f"the mixture was made on another base: {what}; load the base that it was made on{fix}; if this one "
        "is meant, set allow_base_mismatch=True in its config"
    )


def _vocabulary(model: Any) -> int | None:
    try:
        rows = model.get_input_embeddings().weight.shape[0]
    except (AttributeError, NotImplementedError, IndexError):
        return None
    return int(rows) or None


def _plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights whose numbers can be read as they are, in the order of their names."""
    found = {}
    for name, module in base_modules(model).items():
        weight = module._parameters.get("weight") if _IN_A_STACK.search(f"{name}.") else None
        # Biases may train; packed, sharded and traced weights are subclasses, or no floats, or empty.
        if weight is None or type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
            continue
        if weight.is_floating_point() and weight.element_size() > 1 and weight.numel() and not weight.is_meta:
            found[f"{name}.weight"] = weight.detach()
    return dict(sorted(found.items()))


def _spread(names: list[str], count: int) -> list[str]:
    """``count`` of the names, the first and the last among them."""
    steps = [round(i * (len(names) - 1) / max(1, count - 1)) for i in range(count)] if names else []
    return [names[place] for place in sorted(set(steps))]


def _numbers(tensor: Tensor) -> list[float]:
    flat, count = tensor.reshape(-1), min(_NUMBERS, tensor.numel())
    # Off the multiples of a row's length, so that columns differ.
    places = torch.tensor([i * (tensor.numel() - 1) // max(1, count - 1) for i in range(count)])
    return [float(f"{value:.6g}") for value in flat[places.to(flat.device)].float().tolist()]


def _close(one: float, other: float) -> bool:
    return one == other or abs(one - other) <= _RELATIVE * max(abs(one), abs(other)) + _ABSOLUTE
