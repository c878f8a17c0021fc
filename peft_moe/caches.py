"""The cache of a call: where it is among the arguments, and how much it holds.

A router that takes a filled cache for an empty one decides wrongly in silence. What is not recognised is
therefore refused, and never counts as no cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from .errors import PeftMoeError

# Its names up to transformers 5.23 (the second one where layers are recurrent), and in all models since 5.24.
CACHES = ("past_key_values", "cache_params", "cache")
# The same of single architectures (RWKV, XLNet, Reformer): no caches of transformers, and without a length.
STATES = ("state", "mems", "past_buckets_states")


def carries_past(name: str, value: Any) -> bool:
    """Whether this argument of a call is a cache, by its name or by its type; a flag is none."""
    if value is None or isinstance(value, bool | int | float | str):
        return False
    if isinstance(value, Cache) or name in CACHES:
        return True
    return name in STATES and not isinstance(value, Tensor) and hasattr(value, "__len__")


def cache_of(call: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments; None without one.

    Raises:
        PeftMoeError: there are several, and nothing says which one the base reads.
    """
    return _named_cache(call)[1]


def _named_cache(call: Mapping[str, Any]) -> tuple[str, Any]:
    """The cache and its name in the call; an unknown name counts where no known one holds any."""
    found = [(name, value) for name, value in call.items() if carries_past(name, value)]
    known = [(name, value) for name, value in found if name in CACHES]
    name, cache = (known or found or [("", None)])[0]
    for other, value in known or found:
        if value is not cache:
            raise PeftMoeError(
                f"this call has two caches, {name}= ({type(cache).__name__}) and {other}= "
                f"({type(value).__name__}); pass the one that the base reads, and no other"
            )
    return name, cache


def past_length(call: Mapping[str, Any]) -> int:
    """How many tokens the cache holds; 0 without one, 1 for any past of recurrent layers alone.

    Raises:
        PeftMoeError: there is a cache, and its length cannot be told.
    """
    name, cache = _named_cache(call)
    if cache is None:
        return 0
    if is_recurrent(cache):
        return int(cache.has_previous_state())
    if name in STATES:
        return int(len(cache) > 0)
    # xLSTM's own cache counts by itself.
    length = getattr(cache, "seqlen_offset", None)
    if length is None and hasattr(cache, "get_seq_length"):
        length = cache.get_seq_length()
    if not isinstance(length, int | Tensor):
        raise PeftMoeError(_unknown(name, cache))
    return int(length)


def is_recurrent(cache: Any) -> bool:
    """Whether a cache has states of recurrent layers, and no layer with keys and values."""
    layers: Any = getattr(cache, "layers", ()) if isinstance(cache, Cache) else ()
    if any(isinstance(layer, CacheLayerMixin) for layer in layers):
        return False
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def is_static(cache: Any) -> bool:
    """Whether a cache has slots for tokens that are still to come."""
    return isinstance(cache, Cache) and cache.is_compileable and not is_recurrent(cache)


def returned_cache(output: Any, call: Mapping[str, Any]) -> Any:
    """The cache behind a call: that of its output, named or in a tuple, else the one it was given."""
    parts = dict(output) if isinstance(output, Mapping) else {}
    if isinstance(output, tuple):
        parts = {str(index): part for index, part in enumerate(output)}
    caches = {name: part for name, part in parts.items() if isinstance(part, Cache)}
    known = [caches[name] for name in CACHES if name in caches] or list(caches.values())
    return known[0] if len(known) == 1 else cache_of(call)


def _unknown(name: str, cache: Any) -> str:
    kind = f"{type(cache).__module__}.{type(cache).__qualname__}"
    if isinstance(cache, list | tuple):
        return (
            f"{name}= is a {type(cache).__name__} of {len(cache)}, as transformers once kept keys and "
            f"values; routers cannot tell what it holds. Pass transformers.DynamicCache({name})"
        )
    return (
        f"{name}= is a {kind}, and routers cannot tell how many tokens it holds; pass a Cache of "
        "transformers (DynamicCache, StaticCache), as generate() does and generate_batch() does not"
    )
