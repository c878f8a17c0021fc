"""Merging into a base, also a quantised one.

PEFT unpacks and packs a quantised weight; this module reports the rounding error. A mixture changes a
weight by little, and a weight of 4 bits is rounded to one of 16 values, so that much of the change is lost.
The same holds for a plain LoRA. Letters: O out, I in.
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

# ‖error‖/‖change‖ of each layer, by name, during a merge.
_errors: ContextVar[dict[str, float] | None] = ContextVar("peft_moe_requantised", default=None)


def read_weight(layer: Any) -> Tensor:
    """Return the weight of a layer's base in the base's orientation, unpacked where it is quantised."""
    base_layer = layer.get_base_layer()
    backend = _backend(layer)
    weight: Tensor = base_layer.weight.data if backend is None else backend.get_base_weight(base_layer)
    return weight


def write_weight(layer: Any, weight: Tensor, *, before: Tensor | None = None) -> None:
    """Put a weight into a layer's base, packed again where it is quantised.

    Args:
        layer: a layer with experts.
        weight: in the form that :func:`read_weight` returns.
        before: the weight before the change; the error of packing is measured relative to the change.
    """
    backend = _backend(layer)
    if backend is None:
        layer.get_base_layer().weight.data = weight
        return
    backend.set_base_weight(layer, nn.Parameter(weight, requires_grad=False))
    errors = _errors.get()
    if errors is not None and before is not None:
        packed = read_weight(layer).float()
        change = (weight.float() - before.float()).norm().clamp_min(torch.finfo(torch.float32).tiny)
        errors[layer.name] = float((packed - weight.float()).norm() / change)


def check_mergeable(layer: Any) -> None:
    """Check that a layer's weight can be read and written.

    Raises:
        PeftMoeError: its quantisation does not allow it.
    """
    base_layer = layer.get_base_layer()
    backend = _backend(layer)
    if backend is None and _is_plain(base_layer):
        return
    if backend is None or not backend.supports_merge:
        kind = type(base_layer).__name__
        weight_kind = type(getattr(base_layer, "weight", None)).__name__
        raise PeftMoeError(
            f"{layer.name} is a {kind} that holds its weight as {weight_kind}, into which nothing can be "
            "merged; serve the mixture unmerged, or merge it into the base in 16 bits"
        )


@contextmanager
def requantised(layers: list[Any], model: nn.Module) -> Iterator[None]:
    """Tell layers how to pack their weights during a merge, and report the error at the end.

    Args:
        layers: the layers that will be merged.
        model: their base.

    Raises:
        PeftMoeError: at entry, if a layer cannot be merged; no layer is changed then.
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
    """Whether it is a plain float matrix of the layer's sizes; packed ones are subclasses of Tensor."""
    weight, sizes = getattr(base_layer, "weight", None), linear_sizes(base_layer)
    if not isinstance(weight, Tensor) or sizes is None or not weight.is_floating_point():
        return False
    shape = sizes if isinstance(base_layer, Conv1D) else sizes[::-1]
    plain = type(weight.data) is Tensor or type(weight.data).__name__ in ("DTensor", "FakeTensor")
    return plain and tuple(weight.shape) == tuple(shape)
