"""A routing decision that travels with the KV cache.

A decision pooled over the prompt holds for every token that is decoded from the prompt. It must follow its
sequence through beam search, repetition and cropping. Only the cache object goes through all of these, so the
decision is one more layer of the cache, which stores no keys.

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

# Number of summaries that a running router keeps. A rollback of fewer tokens finds the summary before them.
REMEMBERED = 64


class _Storeless:
    """The DummyLayer of transformers, for its versions before 5.23, which do not have it."""

    supports_early_init = False
    is_compileable = True

    def __init__(self) -> None:
        self.is_initialized = True
        self.keys = None
        self.values = None

    def offload(self) -> None: ...

    def prefetch(self) -> None: ...

    def get_max_length(self) -> int:
        """Return -1, which stands for no limit."""
        return -1


_Layer: Any = getattr(cache_utils, "DummyLayer", _Storeless)


class CachedRouting(_Layer):  # type: ignore[misc]  # transformers is untyped here
    """What one adapter's routers need from the earlier steps of a generation.

    Attributes:
        adapter: the adapter's name.
        decisions: by router, tensors [B, 1, ·]: the prompt's decision, or the last one of a router that
            follows the text, with its last summaries; None for routers that decide per token everywhere.
        probe_cache: keys and values of the bare base below the tap; None where no probe runs.
    """

    def __init__(self, adapter: str) -> None:
        super().__init__()
        self.adapter = adapter
        self.decisions: dict[str, Routing] | None = None
        self.probe_cache: DynamicCache | None = None

    def reset(self) -> None:
        """Forget all decisions: the cache starts a new text."""
        self.decisions = None
        self.probe_cache = None

    def crop(self, tokens_to_remove: int) -> None:
        """Take back tokens. The prompt's decision stays."""
        layers: Any = self.probe_cache.layers if self.probe_cache is not None else ()
        for layer in layers:
            # Layers above the tap were never filled. Older versions of transformers do not check that.
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
        """Move the decisions of beams to their new rows."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row, for a prompt that is continued several times."""
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
    """Return what a KV cache holds for ``adapter``; None if it holds nothing, or cannot hold it."""
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        return None
    for layer in reversed(cache.layers):
        if isinstance(layer, CachedRouting) and layer.adapter == adapter:
            return layer
    return None


def attach_routing(cache: Any, routing: CachedRouting) -> None:
    """Put an adapter's decisions into a KV cache, after its own layers, in place of earlier ones.

    Call it after a forward pass: a lazy cache makes its layers during the first pass, and would take the
    decisions for one of them.
    """
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        return
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, CachedRouting) and layer.adapter == routing.adapter:
            cache.layers[index] = routing
            return
    cache.layers.append(routing)
