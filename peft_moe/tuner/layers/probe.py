"""The probe: a run of the bare base that stops at a tap.

Letters: B batch, T sequence, I in (hidden size).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ...errors import PeftMoeError
from ...routing.context import RoutingContext, bound_to
from ...routing.model_call import CACHES, cache_of, carries_past, is_static, past_length
from .tap import Tap

# Arguments that concern losses and outputs, and not the base's hidden states.
_NOT_FOR_THE_PROBE = {
    "labels",
    "use_cache",
    "logits_to_keep",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
}


class TapReached(Exception):  # noqa: N818  # a stop, not an error
    """Ends a probe. Its only argument is the hidden states at the tap, [B, T, I]."""


def run_probe(
    model: nn.Module, tap: Tap, call: dict[str, Any], context: RoutingContext, cache: DynamicCache | None
) -> Tensor:
    """Compute the hidden states of the bare base at the tap, without gradients.

    Args:
        model: the model that carries the mixture. Its mixture layers return the base's output during a probe.
        tap: where to stop.
        call: the arguments of the call that is about to run, by name.
        context: of that call.
        cache: keys and values of earlier steps of the probe, extended in place; None for none.

    Returns:
        [B, T, I] at this call's tokens.
    """
    backbone = getattr(model, "base_model", model)
    accepted = inspect.signature(backbone.forward).parameters
    # Arguments that the head does not name are for the layers (sequence boundaries of packed rows).
    of_head = inspect.signature(model.forward).parameters
    passed_on = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    arguments = {
        name: value
        for name, value in call.items()
        if not (name in _NOT_FOR_THE_PROBE or name in CACHES or carries_past(name, value))
        and (name in accepted or (passed_on and name not in of_head))
    }
    if is_static(cache_of(call)):
        arguments = _without_static_cache(arguments, call, cache)
    if cache is not None:
        arguments.update({_cache_name(backbone): cache, "use_cache": True})
    probing = RoutingContext(shape=context.shape, real=context.real, probing=True, probe_until=tap.layer)
    with torch.no_grad(), bound_to(probing):
        try:
            backbone(**arguments)
        except TapReached as reached:
            hidden_BTI: Tensor = reached.args[0]
            return hidden_BTI
    raise PeftMoeError(f"the base never called {tap.name}, which router_tap names; choose another layer")


def _cache_name(backbone: nn.Module) -> str:
    # The base would ignore a cache under a name that it does not read.
    accepted = inspect.signature(backbone.forward).parameters
    for name in CACHES:
        if name in accepted:
            return name
    raise PeftMoeError(
        f"{type(backbone).__name__} takes its cache under none of the names {', '.join(CACHES)}, so that "
        "router_below_tap='probe' cannot keep one per token; use router_granularity='sequence', "
        "router_below_tap='base', or use_cache=False"
    )


def _without_static_cache(
    arguments: dict[str, Any], call: dict[str, Any], cache: DynamicCache | None
) -> dict[str, Any]:
    # The mask of a static cache covers all its slots. The probe has tokens only.
    if cache is not None or past_length(call) > 0:
        raise PeftMoeError(
            "a router that decides per token with router_below_tap='probe' cannot run on a static KV cache; "
            "use the default dynamic cache, router_granularity='sequence', or router_below_tap='base'"
        )
    mask = arguments.get("attention_mask")
    masks = mask if isinstance(mask, dict) else {"mask": mask}
    cut_masks = {
        name: m[..., : m.shape[-2]] if isinstance(m, Tensor) and m.dim() == 4 else m
        for name, m in masks.items()
    }
    return {**arguments, "attention_mask": cut_masks if isinstance(mask, dict) else cut_masks["mask"]}
