"""Merging into a quantised base: PEFT unpacks and packs the weight, we say what the rounding cost.

A mixture's change is small beside the weight, and a weight of 4 bits is rounded to one of 16 values: much of
the change is lost, for a plain LoRA as well. Letters: O out, I in.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import PeftMoeError
from ...experts.base_modules import linear_sizes

# ‖error‖/‖change‖ of each layer, by name, while somebody listens.
_errors: ContextVar[dict[str, float] | None] = ContextVar("peft_moe_requantised", default=None)


def read_weight(layer: Any) -> Tensor:
    """The weight of a layer's base, unpacked where it is quantised, in the base's own orientation."""
    base_layer = layer.get_base_layer()
    backend = _backend(layer)
    weight: Tensor = base_layer.weight.data if backend is None else backend.get_base_weight(base_layer)
    return weight


def write_weight(layer: Any, weight: Tensor, *, before: Tensor | None = None) -> None:
    """Put a weight into a layer's base, packed again where it is quantised.

    Args:
        layer: a layer with experts.
        weight: as :func:`read_weight` gives it.
        before: what was there, against whose change the error of packing is measured.
    """
    backend = _backend(layer)
    if backend is None:
        layer.get_base_layer().weight.data = weight
        return
    backend.set_base_weight(layer, nn.Parameter(weight, requires_grad=False))
    errors = _errors.get()
    if errors is not None and before is not None:
        kept = read_weight(layer).float()
        change = (weight.float() - before.float()).norm().clamp_min(torch.finfo(torch.float32).tiny)
        errors[layer.name] = float((kept - weight.float()).norm() / change)


def check_mergeable(layer: Any) -> None:
    """Whether a layer's weight can be read and written.

    Raises:
        PeftMoeError: it is quantised in a way that offers neither.
    """
    base_layer = layer.get_base_layer()
    backend = _backend(layer)
    if backend is None and _is_plain(base_layer):
        return
    if backend is None or not backend.supports_merge:
        kind = type(base_layer).__name__
        held = type(getattr(base_layer, "weight", None)).__name__
        raise PeftMoeError(
            f"{layer.name} is a {kind} that holds its weight as {held}, into which nothing can be merged; "
            "serve the mixture unmerged, or merge it into the base in 16 bits"
        )


@contextmanager
def requantised(layers: list[Any], model: nn.Module) -> Iterator[None]:
    """Merge within: layers learn how to pack again, and the error is reported at the end.

    Args:
        layers: those that will be merged.
        model: their base.

    Raises:
        PeftMoeError: at entry, where one of them cannot be merged; nothing has been touched then.
    """
    for layer in layers:
        layer.quantization = get_quantization_kwargs(model)
        check_mergeable(layer)
    errors: dict[str, float] = {}
    token = _errors.set(errors)
    try:
        yield
    finally:
        _errors.reset(token)
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        mean = sum(errors.values()) / len(errors)
        warnings.warn(
            f"merged into a quantised base: packing {len(errors)} weights again left an error of {mean:.1%} "
            f"of what the mixture changes (‖error‖/‖change‖, mean over layers; {errors[worst]:.1%} in "
            f"{worst}); for an exact result merge into the base in 16 bits",
            stacklevel=3,
        )


def _backend(layer: Any) -> Any:
    return resolve_quantization_backend(layer.get_base_layer(), **getattr(layer, "quantization", {}))


def _is_plain(base_layer: nn.Module) -> bool:
    """A float matrix of the layer's own sizes; subclasses of tensors, but for shards, are packed."""
    weight, sizes = getattr(base_layer, "weight", None), linear_sizes(base_layer)
    if not isinstance(weight, Tensor) or sizes is None or not weight.is_floating_point():
        return False
    shape = sizes if isinstance(base_layer, Conv1D) else sizes[::-1]
    plain = type(weight.data) is Tensor or type(weight.data).__name__ in ("DTensor", "FakeTensor")
    return plain and tuple(weight.shape) == tuple(shape)
