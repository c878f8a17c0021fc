"""A routing decision that travels with the KV cache.

A decision pooled over the prompt must hold for every token that is decoded from it, and follow its
sequence through beam search, repetition and cropping. The cache object is the only thing that all
those paths move along, so the decision lives in it, as one more layer that stores no keys.

Letters: B batch, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from ..errors import PeftMoeError
from .context import Routing

# Summaries that a running router keeps, so that a rollback of that many tokens finds the one before them.
REMEMBERED = 64


class _Storeless:
    """transformers' DummyLayer, for its versions before 5.23, which have none."""

    supports_early_init = False
    is_compileable = True

    def __init__(self) -> None:
        self.is_initialized = True
        self.keys = None
        self.values = None

    def offload(self) -> None: ...

    def prefetch(self) -> None: ...

    def get_max_length(self) -> int:
        """No limit."""
        return -1


_Layer: Any = getattr(cache_utils, "DummyLayer", _Storeless)


class CachedRouting(_Layer):  # type: ignore[misc]  # transformers is untyped here
    """What one adapter's router must remember between the steps of a generation.

    Attributes:
        adapter: the adapter's name.
        decisions: by router, tensors [B, 1, ·]: the prompt's, or the last one of a router that follows the
            text, with its last summaries; None for routers that decide per token everywhere.
        probe_cache: keys and values of the bare base below the tap; None where no probe runs.
    """

    def __init__(self, adapter: str) -> None:
        super().__init__()
        self.adapter = adapter
        self.decisions: dict[str, Routing] | None = None
        self.probe_cache: DynamicCache | None = None

    def reset(self) -> None:
        """Forget everything: the cache starts a new text."""
        self.decisions = None
        self.probe_cache = None

    def crop(self, tokens_to_remove: int) -> None:
        """Follow a rollback; the prompt's decision stands."""
        layers: Any = self.probe_cache.layers if self.probe_cache is not None else ()
        for layer in layers:
            # Those above the tap were never filled, which older versions of transformers do not look at.
            if getattr(layer, "is_initialized", True):
                layer.crop(tokens_to_remove)
        removed = abs(tokens_to_remove)
        for name, routing in (self.decisions or {}).items():
            if routing.running is None or removed == 0:
                continue
            if removed >= routing.running.shape[1]:
                raise PeftMoeError(
                    f"adapter {self.adapter!r}: router {name!r} follows the text and remembers the last "
                    f"{routing.running.shape[1]} tokens, so that {removed} cannot be taken back; "
                    "fill a new cache"
                )
            routing.running = routing.running[:, :-removed]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow beams to their new rows."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Follow a prompt that is continued several times."""
        self._move(lambda t: t.repeat_interleave(repeats, dim=0))
        if self.probe_cache is not None:
            self.probe_cache.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        self._move(lambda t: t.index_select(0, indices.to(t.device)))
        if self.probe_cache is not None:
            self.probe_cache.batch_select_indices(indices.to(torch.long))

    def _move(self, move: Callable[[Tensor], Tensor]) -> None:
        if self.decisions is not None:
            self.decisions = {name: routing.map(move) for name, routing in self.decisions.items()}


def find_routing(cache: Any, adapter: str) -> CachedRouting | None:
    """The state of ``adapter`` in a KV cache, None if it has none (or is no cache that can hold one)."""
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        return None
    for layer in reversed(cache.layers):
        if isinstance(layer, CachedRouting) and layer.adapter == adapter:
            return layer
    return None


def attach_routing(cache: Any, routing: CachedRouting) -> None:
    """Put a state into a KV cache, behind its own layers; it replaces one of the same adapter.

    Must be called after a forward pass: a lazy cache makes its layers during the first one, and would
    take the state for one of them.
    """
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        return
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, CachedRouting) and layer.adapter == routing.adapter:
            cache.layers[index] = routing
            return
    cache.layers.append(routing)
