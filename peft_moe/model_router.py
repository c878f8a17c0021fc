"""The mixture's seat at the model: it opens a context for each forward pass, and decides for scope "model".

One pre-hook on the model that was given to ``get_peft_model`` sees every path that leads into it
(PeftModel, generate, trainers, transformers' own adapters). A router of scope "model" reads the
hidden states at its tap, the input of one decoder layer, in one of two ways:

- below_tap="base": the layers below the tap stay unadapted, so that the tap is read in the same pass;
- below_tap="probe": the bare base first runs up to the tap and stops there. For a decision per prompt
  that happens at prefill only; for one per token in every step, with a small KV cache of its own.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from .call import named_arguments, past_length, read_call
from .checkpointing import bind_checkpoints, refuse_reentrant
from .decode_state import RouterState, attach_state, find_state
from .errors import PeftMoeError
from .probe import TapReached, run_probe
from .routers import Router
from .routing import (
    Routing,
    RoutingContext,
    current_context,
    enter_context,
    is_recording,
    leave_context,
    report,
)
from .sharing import MODEL_SEAT, SharedRouter
from .taps import Tap


class ModelRouter(SharedRouter):
    """Holds the routers of scope "model", one per adapter, and the hooks of all mixtures of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(MODEL_SEAT)
        self.taps: dict[str, Tap] = {}
        # Adapter to the auxiliary loss that its config asks for, until its user was warned.
        self.loss_fields: dict[str, str] = {}
        self.handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]
        # Decisions of a generation without KV cache, whose later steps would pool over the completion.
        self.pinned: dict[str, Routing] | None = None
        # Tokens of the prompt that ``generate`` was given, while it runs.
        self.prompt_length: int | None = None

    def add_model_router(self, adapter: str, router: Router, tap: Tap) -> None:
        """Take in a router of scope "model", and watch its tap."""
        self.add_router(adapter, router)
        self.taps[adapter] = tap
        self.handles.append(tap.layer.register_forward_pre_hook(self._at_tap, with_kwargs=True))

    def _home(self, adapter: str) -> nn.Module | None:
        return self.taps[adapter].layer if adapter in self.taps else None

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's deletion, and the tap with it."""
        super().delete_adapter(adapter_name)
        self.taps.pop(adapter_name, None)
        self.loss_fields.pop(adapter_name, None)

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running = current_context()
        if running is not None and running.probing:
            return
        call = named_arguments(model, args, kwargs)
        context = read_call(call, causal=_generates(model), prompt_length=self.prompt_length)
        enter_context(context)
        bind_checkpoints(model)
        if self.loss_fields and model.training and torch.is_grad_enabled() and not is_recording():
            self._warn_unheard()
        for adapter in self._deciding():
            self._prepare(model, adapter, call, context)

    def _warn_unheard(self) -> None:
        # Trainers rebuild the loss from the outputs, and would drop the auxiliary one in silence.
        for adapter in [] if self.disable_adapters else self.active_adapters:
            if field := self.loss_fields.pop(adapter, None):
                warnings.warn(
                    f"{field} of adapter {adapter!r} has no effect here: nobody adds router losses. "
                    "Train with peft_moe.training.MoLoraSFTTrainer, or put RouterTrainerMixin first",
                    stacklevel=2,
                )

    def _deciding(self) -> list[str]:
        if self.disable_adapters:
            return []
        return [adapter for adapter in self.active_adapters if adapter in self.molora_router]

    def _prepare(self, model: nn.Module, adapter: str, call: dict[str, Any], context: RoutingContext) -> None:
        router, tap = self.molora_router[adapter], self.taps[adapter]
        if model.training and torch.is_grad_enabled():
            refuse_reentrant(model)
        if router.settings.granularity == "sequence":
            kept = self._kept_decision(adapter, call, context)
            if kept is not None:
                self._settle(adapter, kept, context)
                return
        if tap.below == "probe":
            self._refuse_late_prompt(adapter, call)
            probe_cache = self._probe_cache(model, adapter, call, context)
            hidden_BTI = run_probe(model, tap, call, context, probe_cache)
            self._settle(adapter, router(hidden_BTI, context), context)

    def _kept_decision(self, adapter: str, call: dict[str, Any], context: RoutingContext) -> Routing | None:
        if self.pinned and adapter in self.pinned and past_length(call) == 0:
            return self.pinned[adapter]
        if context.prompt is not None:
            return None  # the caller marks a prompt: a new turn, a new decision
        if past_length(call) > 0:
            state = find_state(call["past_key_values"], adapter)
            if state is None or state.decision is None:
                raise PeftMoeError(
                    f"adapter {adapter!r} decides once per prompt, and this KV cache holds no decision of "
                    "it; fill the cache with this adapter active, or mark the prompt with routing_inputs()"
                )
            return state.decision
        return None

    def _refuse_late_prompt(self, adapter: str, call: dict[str, Any]) -> None:
        # The bare base has no keys of the cached tokens: a probe of the new ones alone would misread them.
        if self.molora_router[adapter].settings.granularity == "sequence" and past_length(call) > 0:
            raise PeftMoeError(
                f"adapter {adapter!r}: a new prompt on a filled KV cache cannot be probed with "
                "router_below_tap='probe'; pass the whole text without cache, or use router_below_tap='base'"
            )

    def _probe_cache(
        self, model: nn.Module, adapter: str, call: dict[str, Any], context: RoutingContext
    ) -> DynamicCache | None:
        # A decision per token needs the base's own keys below the tap in every decoding step.
        router = self.molora_router[adapter]
        if router.settings.granularity != "token" or not _fills_cache(model, call):
            return None
        state = find_state(call.get("past_key_values"), adapter)
        if state is not None and state.probe_cache is not None:
            return state.probe_cache
        if past_length(call) > 0:
            raise PeftMoeError(
                f"adapter {adapter!r} probes the base in every step, and this KV cache was filled without "
                "it; fill the cache with this adapter active"
            )
        cache = DynamicCache(config=model.config.get_text_config())  # type: ignore[union-attr,operator]
        context.probe_caches[adapter] = cache
        return cache

    def _at_tap(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context = current_context()
        if context is None:
            return
        hidden_BTI = args[0] if args else kwargs["hidden_states"]
        if context.probing:
            if context.probe_until is layer:
                raise TapReached(hidden_BTI)
            return
        for adapter in self._deciding():
            tap = self.taps[adapter]
            if tap.layer is layer and tap.below == "base" and adapter not in context.shared:
                self._settle(adapter, self.molora_router[adapter](hidden_BTI, context), context)

    def _settle(self, adapter: str, routing: Routing, context: RoutingContext) -> None:
        context.shared[adapter] = routing
        report(f"{MODEL_SEAT}.{adapter}", routing)

    def _end(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        context = current_context()
        if context is None or context.probing:
            return
        leave_context()
        if output is None:
            return  # the call failed
        cache = _returned_cache(output, named_arguments(model, args, kwargs))
        for adapter, routing in context.shared.items():
            self._keep(adapter, routing, cache, context)

    def _keep(self, adapter: str, routing: Routing, cache: Any, context: RoutingContext) -> None:
        if adapter not in self.molora_router:
            return
        if self.molora_router[adapter].settings.granularity == "sequence":
            state = find_state(cache, adapter)
            if state is not None and state.decision is routing:
                return  # a decoding step that followed it
            # A later step continues the last turn.
            last = routing.detach().map(lambda t: t[:, -1:])
            if self.pinned is not None:
                self.pinned.setdefault(adapter, last)
            state = RouterState(adapter)
            state.decision = last
            attach_state(cache, state)
        elif adapter in context.probe_caches:
            state = RouterState(adapter)
            state.probe_cache = context.probe_caches[adapter]
            attach_state(cache, state)


def _generates(model: nn.Module) -> bool:
    return bool(getattr(model, "can_generate", lambda: False)())


def _fills_cache(model: nn.Module, call: dict[str, Any]) -> bool:
    if call.get("past_key_values") is not None:
        return True
    # Left open, it is the base's default; in training nobody uses the cache that comes of it.
    by_default = getattr(model.config, "use_cache", False) and not model.training
    return bool(call.get("use_cache", by_default))


def _returned_cache(output: Any, call: dict[str, Any]) -> Any:
    cache = getattr(output, "past_key_values", None)
    return cache if cache is not None else call.get("past_key_values")


def model_decision(adapter: str, layer_name: str) -> Routing:
    """The decision that scope "model" took for the running forward pass.

    Raises:
        PeftMoeError: none was taken: the part that was called is not the model that carries the
            mixture, or the layer lies below a tap that is read in the same pass.
    """
    context = current_context()
    if context is None or adapter not in context.shared:
        raise PeftMoeError(
            f"{layer_name}: router_scope='model' has taken no decision; call the whole model, not a "
            "part of it"
        )
    return context.shared[adapter]
