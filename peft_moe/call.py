"""Reading one call of the base model: which tokens are real, which are prompt, what came before.

Letters: B batch, T sequence.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .caches import cache_of, past_length
from .errors import PeftMoeError
from .routing import RoutingContext, current_inputs

IGNORE = -100


def named_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ``model``, by name; those after a ``*args`` are left out."""
    if not args:
        return kwargs
    names = [
        name
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def given_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and width of the ids in a user's call of the model or of ``generate``, None where it has none."""
    named = (kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds"))
    given = next((value for value in (*args[:1], *named) if isinstance(value, Tensor)), None)
    return (given.shape[0], given.shape[1]) if given is not None and given.dim() >= 2 else None


def generates(model: nn.Module) -> bool:
    """Whether the model writes text."""
    return bool(getattr(model, "can_generate", lambda: False)())


def fills_cache(model: nn.Module, call: dict[str, Any]) -> bool:
    """Whether this call's keys and values are kept for a later one."""
    if cache_of(call) is not None:
        return True
    # Left open, it is the base's default; in training nobody uses the cache that comes of it.
    by_default = getattr(model.config, "use_cache", False) and not model.training
    return bool(call.get("use_cache", by_default))


def read_call(
    call: dict[str, Any], *, causal: bool, given: tuple[int, int] | None = None, count_turns: bool = True
) -> RoutingContext:
    """The context of one forward pass, from the model's own arguments and from ``routing_inputs``.

    Args:
        call: arguments by name; ``input_ids`` or ``inputs_embeds``, ``attention_mask`` (2-D, the 4-D
            one of static caches, or a dict of such) and ``labels`` are looked at.
        causal: whether the model generates, so that ignored labels mark its prompt. In an encoder
            they mark tokens that are not scored, which says nothing about prompts.
        given: rows and width of the ids that the user gave, where this call may be one of many that
            continue them: what lies behind them in a call without a past are candidates and answers,
            never prompt; and their rows may be repeated for beams.
        count_turns: whether to tell the prompt's turns apart, which reads a number back from the device.
    """
    tokens = call.get("input_ids")
    if tokens is None:
        tokens = call.get("inputs_embeds")
    if not isinstance(tokens, Tensor) or tokens.dim() < 2:
        return RoutingContext()
    shape = (tokens.shape[0], tokens.shape[1])
    past = past_length(call)
    context = RoutingContext(real=_real_tokens(call.get("attention_mask"), shape, past), shape=shape)
    if call.get("input_ids") is not None:
        context.input_ids = tokens
    inputs = current_inputs()
    if inputs is not None and inputs.domains is not None:
        domains = inputs.domains.to(tokens.device)
        if domains.dim() == 2 and domains.shape[1] != shape[1]:
            raise PeftMoeError(
                f"domains is {tuple(domains.shape)}, this call has {shape} tokens; give columns [B] or [B, T]"
            )
        context.domains = per_row(domains, shape[0], "domains", given)
    if inputs is not None and inputs.gates is not None:
        gates = torch.as_tensor(inputs.gates, dtype=torch.float32, device=tokens.device)
        if gates.dim() != 2 and not (gates.dim() == 3 and gates.shape[1] == shape[1]):
            raise PeftMoeError(
                f"gates is {tuple(gates.shape)}, this call has {shape} tokens; give weights [B, E], [1, E] "
                "or [B, T, E]"
            )
        gates = per_row(gates, shape[0], "gates", given)
        context.gates = gates if gates.dim() == 3 else gates[:, None]
    if inputs is not None and inputs.prompt_mask is not None:
        if not (past > 0 and inputs.prompt_used):
            inputs.prompt_used = True
            mask = _as_call(inputs.prompt_mask.to(tokens.device).bool(), shape, past, given)
            _set_prompt(context, mask, shape, count_turns)
    elif past == 0 and given is not None and shape[1] > given[1]:
        all_BT = torch.ones(given, dtype=torch.bool, device=tokens.device)
        _set_prompt(context, _as_call(all_BT, shape, past, given), shape, count_turns)
    elif causal and _is_per_token(call.get("labels"), shape):
        _set_prompt(context, call["labels"].to(tokens.device) == IGNORE, shape, count_turns)
    return context


def per_row(values: Tensor, rows: int, name: str, given: tuple[int, int] | None) -> Tensor:
    """One entry per row of the call; in a generation, beams and repeated prompts follow their own."""
    if len(values) == rows or (len(values) == 1 and values.dim() > 1):
        return values
    if given is None or len(values) != given[0] or len(values) == 0 or rows % len(values):
        raise PeftMoeError(
            f"{name} has {len(values)} entries, this call has {rows} sequences; give one for each"
        )
    return values.repeat_interleave(rows // len(values), dim=0)


def _as_call(prompt_BT: Tensor, shape: tuple[int, int], past: int, given: tuple[int, int] | None) -> Tensor:
    """A mask of the ids given to ``generate``, as this call sees it: one row per beam, answers behind."""
    rows, width = prompt_BT.shape
    if given is None or (rows, width) != given or rows == 0 or shape[0] % rows:
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
        # With a cache the mask also covers the past; this call's tokens are the last ones.
        return mask[:, -length:].bool()
    if mask.dim() == 4 and past == 0 and mask.shape[-2] == length <= mask.shape[-1]:
        # A real token attends to itself, within every window; nobody attends to padding.
        # Boolean masks say True for "attend", additive ones say 0.
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
    # A turn begins wherever prompt tokens follow others; padding before the first belongs to turn 0.
    starts_BT = prompt_BT & ~torch.nn.functional.pad(prompt_BT, (1, 0))[:, :-1]
    turns_B = starts_BT.sum(-1)
    # The only place that reads a value back from the device; decoding steps carry no prompt mask.
    most, fewest = torch.stack((turns_B.max(), turns_B.min())).tolist() if len(turns_B) else (1, 1)
    context.prompt_missing = fewest == 0
    if most > 1:
        context.num_segments = int(most)
        context.segment = (starts_BT.cumsum(-1) - 1).clamp_min(0)
