"""What identifies the weights of a mixture: digests of experts, and its tensors by their names in a file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...io.digests import belongs
from ...io.offload import read, read_state
from ..layers.shared_router import MixtureLayer

WeightOf = Callable[[Any, str], Tensor | None]
Slab = tuple[str, str, Tensor]
"""Layer, "A" or "B", and an expert's part of that factor, [r, I] or [r, O]."""

_OURS = re.compile(r"(?:^|\.)molora_(?:A|B|router)\.([A-Za-z0-9_-]+)\.")


def adapter_of(key: str) -> str | None:
    """The adapter whose tensor a key of a state dict names; None if it is none of a mixture's."""
    found = _OURS.search(key)
    return found[1] if found else None


def mixture_layers(model: nn.Module, adapter: str) -> dict[str, Any]:
    """The layers that have experts of ``adapter``, by name, in order."""
    found = {
        m.name: m
        for m in model.modules()
        if isinstance(m, MixtureLayer) and adapter in getattr(m, "molora_A", ())
    }
    return dict(sorted(found.items()))


def expert_digests(model: nn.Module, adapter: str, weight_of: WeightOf | None = None) -> list[str | None]:
    """One per expert: the dtypes of its tensors, a colon, and the SHA-256 of all of them.

    Layers come in the order of their names, A [r, I] before B [r, O]; each enters with its name, dtype, shape
    and bytes. None where the weights are not all here (empty, or split between processes).

    Args:
        model: the base with its mixtures.
        adapter: which.
        weight_of: where to take weights from, by layer and side ("A", "B"); default: the model's own.
    """

    def own(layer: Any, side: str) -> Tensor:
        return read(getattr(layer, f"molora_{side}")[adapter])

    layers = mixture_layers(model, adapter)
    if not layers:
        return []
    ranks = next(iter(layers.values())).mixtures[adapter].rank_map.ranks
    return [_digest(layers, adapter, expert, weight_of or own) for expert in range(len(ranks))]


def saved_tensors(model: nn.Module, adapter: str, part: str) -> list[tuple[str, Tensor]]:
    """The weights of a mixture by their names in its file, in their order.

    Args:
        model: the base with its mixtures.
        adapter: which.
        part: "routers" or "all".
    """
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if adapter_of(f"{path}.") == adapter and path.endswith(f".{adapter}"):
            for name, tensor in read_state(module).items():
                found[f"base_model.model.{path.removesuffix('.' + adapter)}.{name}"] = tensor
    return sorted((key, tensor) for key, tensor in found.items() if belongs(key, part))


def short(digest: str | None) -> str:
    """A digest as messages show it."""
    return f"{str(digest).rpartition(':')[2][:12]}…"


def _digest(layers: dict[str, Any], adapter: str, expert: int, weight_of: WeightOf) -> str | None:
    slabs: list[Slab] = []
    for name, layer in layers.items():
        segment = layer.mixtures[adapter].rank_map.slices()[expert]
        if segment.start == segment.stop:
            continue
        for side in "AB":
            found = weight_of(layer, side)
            if found is None:
                return None
            weight = found.detach()
            if weight.is_meta or weight.dim() != 2 or len(weight) != layer.mixtures[adapter].rank_map.total:
                return None
            if hasattr(weight, "to_local"):  # a part of a tensor that other processes share
                return None
            slabs.append((name, side, weight[segment]))
    return slab_digest(slabs)


def slab_digest(slabs: Iterable[Slab]) -> str:
    """Digest of one expert, as :func:`expert_digests` gives it.

    Args:
        slabs: by the names of the layers, A before B.
    """
    digest, dtypes = hashlib.sha256(), set()
    for name, side, part in slabs:
        slab, dtype = part.contiguous().cpu(), str(part.dtype).removeprefix("torch.")
        dtypes.add(dtype)
        digest.update(f"{name} {side} {dtype} {list(slab.shape)}\n".encode())
        digest.update(slab.view(torch.uint8).numpy().data)
    return f"{'+'.join(sorted(dtypes))}:{digest.hexdigest()}"
