"""Reading one call of the base model: which tokens are real, which are prompt, what its cache holds.

A router that takes a filled cache for an empty one decides wrongly in silence. A cache that is not recognised
is therefore refused, and never counts as no cache.

Letters: B batch, T sequence.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from ..errors import PeftMoeError
from .context import Request, RoutingContext, RoutingInputs

IGNORE = -100


def named_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of ``model`` by name, without those of a ``*args``."""
    if not args:
        return kwargs
    names = [
        name
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return {**dict(zip(names, args, strict=False)), **kwargs}


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
    caches = [(name, value) for name, value in call.items() if carries_past(name, value)]
    # Under a known name if there is one; else the type tells.
    caches = [(name, value) for name, value in caches if name in CACHES] or caches
    name, cache = (caches or [("", None)])[0]
    for other, value in caches:
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
    by_name = [caches[name] for name in CACHES if name in caches] or list(caches.values())
    return by_name[0] if len(by_name) == 1 else cache_of(call)


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


def prompt_shape_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """Return rows and width of the ids in a user's call of the model or of ``generate``; None without ids."""
    named = (kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds"))
    ids = next((value for value in (*args[:1], *named) if isinstance(value, Tensor)), None)
    return (ids.shape[0], ids.shape[1]) if ids is not None and ids.dim() >= 2 else None


def generates(model: nn.Module) -> bool:
    """Whether the model writes text."""
    return bool(getattr(model, "can_generate", lambda: False)())


def fills_cache(model: nn.Module, call: dict[str, Any]) -> bool:
    """Whether this call keeps its keys and values for a later call."""
    if cache_of(call) is not None:
        return True
    # Without the argument, the base's default applies. In training the cache is not used.
    by_default = getattr(model.config, "use_cache", False) and not model.training
    return bool(call.get("use_cache", by_default))


def read_call(
    call: dict[str, Any], request: Request, *, causal: bool, count_turns: bool = True
) -> RoutingContext:
    """Make the context of one forward pass from the model's arguments and the caller's request.

    Args:
        call: arguments by name; ``input_ids`` or ``inputs_embeds``, ``attention_mask`` (2-D, the 4-D
            one of static caches, or a dict of these) and ``labels`` are read.
        request: what the caller asks for. In a generation, the tokens after the user's ids are candidates and
            answers, never prompt, and the user's rows may be repeated for beams.
        causal: whether the model generates, so that ignored labels mark its prompt. In an encoder they mark
            tokens without a score, which are not a prompt.
        count_turns: whether to tell the prompt's turns apart, which reads a number from the device.

    Raises:
        PeftMoeError: inputs of another shape than the call's.
    """
    generation, inputs = request.generation, request.inputs
    tokens = call.get("input_ids")
    if tokens is None:
        tokens = call.get("inputs_embeds")
    if not isinstance(tokens, Tensor) or tokens.dim() < 2:
        return RoutingContext(recorder=request.recorder, generation=generation)
    shape = (tokens.shape[0], tokens.shape[1])
    past = past_length(call)
    real_BT = _real_tokens(call.get("attention_mask"), shape, past)
    context = RoutingContext(real=real_BT, shape=shape, recorder=request.recorder, generation=generation)
    if call.get("input_ids") is not None:
        context.input_ids = tokens
    prompt_shape = None if generation is None else generation.prompt_shape
    if inputs is not None:
        _read_inputs(context, inputs, tokens, shape, prompt_shape)
    if inputs is not None and inputs.prompt_mask is not None:
        if not (past > 0 and inputs.prompt_used):
            inputs.prompt_used = True
            mask_BT = inputs.prompt_mask.to(tokens.device).bool()
            _set_prompt(context, _as_call(mask_BT, shape, past, prompt_shape), shape, count_turns)
    elif past == 0 and prompt_shape is not None and shape[1] > prompt_shape[1]:
        all_BT = torch.ones(prompt_shape, dtype=torch.bool, device=tokens.device)
        _set_prompt(context, _as_call(all_BT, shape, past, prompt_shape), shape, count_turns)
    elif causal and _is_per_token(call.get("labels"), shape):
        _set_prompt(context, call["labels"].to(tokens.device) == IGNORE, shape, count_turns)
    return context


def _read_inputs(
    context: RoutingContext,
    inputs: RoutingInputs,
    tokens: Tensor,
    shape: tuple[int, int],
    prompt_shape: tuple[int, int] | None,
) -> None:
    """Put the caller's domains and gates into the context, with a row for each row of the call."""
    if inputs.domains is not None:
        domains = inputs.domains.to(tokens.device)
        if domains.dim() == 2 and domains.shape[1] != shape[1]:
            raise PeftMoeError(
                f"domains is {tuple(domains.shape)}, this call has {shape} tokens; give columns [B] or [B, T]"
            )
        context.domains = per_row(domains, shape[0], "domains", prompt_shape)
    if inputs.gates is not None:
        gates = torch.as_tensor(inputs.gates, dtype=torch.float32, device=tokens.device)
        if gates.dim() != 2 and not (gates.dim() == 3 and gates.shape[1] == shape[1]):
            raise PeftMoeError(
                f"gates is {tuple(gates.shape)}, this call has {shape} tokens; give weights [B, E], [1, E] "
                "or [B, T, E]"
            )
        gates = per_row(gates, shape[0], "gates", prompt_shape)
        context.gates = gates if gates.dim() == 3 else gates[:, None]


def per_row(values: Tensor, rows: int, name: str, prompt_shape: tuple[int, int] | None) -> Tensor:
    """Return one entry per row of the call. Beams and repeated prompts get the entry of their sequence."""
    if len(values) == rows or (len(values) == 1 and values.dim() > 1):
        return values
    if prompt_shape is None or len(values) != prompt_shape[0] or len(values) == 0 or rows % len(values):
        raise PeftMoeError(
            f"{name} has {len(values)} entries, this call has {rows} sequences; give one for each"
        )
    return values.repeat_interleave(rows // len(values), dim=0)


def _as_call(
    prompt_BT: Tensor, shape: tuple[int, int], past: int, prompt_shape: tuple[int, int] | None
) -> Tensor:
    """Return the mask of the user's ids for this call: a row per beam, and False at the answers."""
    rows, width = prompt_BT.shape
    if prompt_shape is None or (rows, width) != prompt_shape or rows == 0 or shape[0] % rows:
        return prompt_BT
    prompt_BT = prompt_BT.repeat_interleave(shape[0] // rows, dim=0)
    if past > 0:
        return prompt_BT[:, past : past + shape[1]]
    return torch.nn.functional.pad(prompt_BT, (0, max(0, shape[1] - width)))


def _is_per_token(labels: Any, shape: tuple[int, int]) -> bool:
    return isinstance(labels, Tensor) and tuple(labels.shape) == shape


def _real_tokens(mask: Any, shape: tuple[int, int], past: int) -> Tensor | None:
    if isinstance(mask, dict):
        mask = next((m for m in mask.values() if isinstance(m, Tensor)), None)
    if not isinstance(mask, Tensor):
        return None
    length = shape[1]
    if mask.dim() == 2:
        # With a cache the mask also covers the past. This call's tokens are the last ones.
        return mask[:, -length:].bool()
    if mask.dim() == 4 and past == 0 and mask.shape[-2] == length <= mask.shape[-1]:
        # A real token attends to itself in every window, and no token attends to padding. Boolean masks
        # have True for "attend", additive ones 0.
        attends = mask if mask.dtype == torch.bool else mask == 0
        return attends[:, 0].diagonal(dim1=-2, dim2=-1)
    return None


def _set_prompt(
    context: RoutingContext, prompt_BT: Tensor, shape: tuple[int, int], count_turns: bool
) -> None:
    if tuple(prompt_BT.shape) != shape:
        raise PeftMoeError(
            f"prompt_mask is {tuple(prompt_BT.shape)}, this call has {shape} tokens; "
            "pass a mask of exactly this call's tokens"
        )
    if context.real is not None:
        prompt_BT = prompt_BT & context.real
    context.prompt = prompt_BT
    if not count_turns:
        return
    # A turn begins where a prompt token follows another token. Padding before the first turn is in turn 0.
    starts_BT = prompt_BT & ~torch.nn.functional.pad(prompt_BT, (1, 0))[:, :-1]
    turns_B = starts_BT.sum(-1)
    # Only this line reads a value from the device. Decoding steps have no prompt mask.
    most, fewest = torch.stack((turns_B.max(), turns_B.min())).tolist() if len(turns_B) else (1, 1)
    context.prompt_missing = fewest == 0
    if most > 1:
        context.num_segments = int(most)
        context.segment = (starts_BT.cumsum(-1) - 1).clamp_min(0)
