"""The mixture's seat at the model: it opens a context for each forward pass, and decides for scope "model".

One pre-hook on the model that was given to ``get_peft_model`` sees every path that leads into it
(PeftModel, generate, trainers, transformers' own adapters). A router of scope "model" reads the
hidden states at its tap, the input of one decoder layer, in one of three ways:

- below_tap="base": the layers below the tap stay unadapted, so that the tap is read in the same pass;
- below_tap="probe": the bare base first runs up to the tap and stops there. For a decision per prompt
  that happens at prefill only; for one per token in every step, with a small KV cache of its own;
- below_tap="prompt", for decisions per token: the layers below the tap follow a decision pooled over the
  prompt, from a probe at prefill only, and the tap is read in the same pass for the layers above.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from .caches import cache_of, past_length, returned_cache
from .call import fills_cache, generates, named_arguments, read_call
from .checkpointing import bind_checkpoints, refuse_reentrant
from .config import MoLoraConfig
from .decode_state import REMEMBERED, RouterState, attach_state, find_state
from .errors import PeftMoeError
from .limits import apply_controls, refuse_company
from .probe import TapReached, run_probe
from .routers import Router
from .routing import (
    Routing,
    RoutingContext,
    below,
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
        # Adapters whose decisions outlive their call (once per prompt, or running), in whatever scope.
        self.per_prompt: set[str] = set()
        # Those of them whose decision then follows the text.
        self.running: set[str] = set()
        # Adapter to its config, which names its experts.
        self.mixtures: dict[str, MoLoraConfig] = {}
        # Adapter to the auxiliary loss that its config asks for, until its user was warned.
        self.loss_fields: dict[str, str] = {}
        self.handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]
        # Decisions of a generation without KV cache, whose later steps would pool over the completion.
        self.pinned: dict[str, dict[str, Routing]] | None = None
        # Rows and width of the ids that the user gave, while his call runs: one pass, or a generation.
        self.given: tuple[int, int] | None = None

    def add_model_router(self, adapter: str, router: Router, tap: Tap) -> None:
        """Take in a router of scope "model", and watch its tap."""
        self.add_router(adapter, router)
        self.taps[adapter] = tap
        if not router.reads_hidden:
            return
        self.handles.append(tap.layer.register_forward_pre_hook(self._at_tap, with_kwargs=True))

    def _home(self, adapter: str) -> nn.Module | None:
        return self.taps[adapter].layer if adapter in self.taps else None

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's deletion, and the tap with it."""
        super().delete_adapter(adapter_name)
        self.taps.pop(adapter_name, None)
        self.per_prompt.discard(adapter_name)
        self.running.discard(adapter_name)
        self.loss_fields.pop(adapter_name, None)
        self.mixtures.pop(adapter_name, None)

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running = current_context()
        if running is not None and running.probing:
            return
        call = named_arguments(model, args, kwargs)
        # A traced call cannot branch on numbers; routers that decide by the token have no use for turns.
        turns = bool(self.per_prompt) or not torch.compiler.is_compiling()
        context = read_call(call, causal=generates(model), given=self.given, count_turns=turns)
        if not self.disable_adapters:
            mixtures = {a: self.mixtures[a] for a in self.adapters_now() if a in self.mixtures}
            refuse_company(mixtures)
            apply_controls(context, mixtures, self.given)
        enter_context(context)
        bind_checkpoints(model)
        if self.loss_fields and model.training and torch.is_grad_enabled() and not is_recording():
            self._warn_unheard()
        if context.gates is not None or self.disable_adapters:
            return
        for adapter in self.adapters_now():
            if adapter in self.per_prompt:
                self._continue(adapter, call, context)
            if adapter in self.molora_router:
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

    def _continue(self, adapter: str, call: dict[str, Any], context: RoutingContext) -> None:
        kept = self._kept_decisions(adapter, call, context)
        if kept is not None:
            context.kept[adapter] = kept

    def _prepare(self, model: nn.Module, adapter: str, call: dict[str, Any], context: RoutingContext) -> None:
        router, tap = self.molora_router[adapter], self.taps[adapter]
        if model.training and torch.is_grad_enabled():
            refuse_reentrant(model)
        if not router.reads_hidden:
            self._settle(adapter, router(_no_hidden(router, context), context), context)
            return
        if tap.below == "base":
            return
        once = router.pools or tap.below == "prompt"

        def probe(before: Tensor | None = None) -> Routing:
            self._refuse_late_prompt(adapter, call, once)
            probe_cache = None if once else self._probe_cache(model, adapter, call, context)
            hidden_BTI = run_probe(model, tap, call, context, probe_cache)
            routing: Routing = router(hidden_BTI, context, pool=once, before=before)
            return routing

        lasting = adapter in self.per_prompt
        routing = context.decide(adapter, MODEL_SEAT, probe) if lasting else probe()
        if tap.below == "prompt":
            context.shared[below(adapter)] = router.limited(routing, context.limits.get(adapter), context)
        else:
            self._settle(adapter, routing, context)

    def _kept_decisions(
        self, adapter: str, call: dict[str, Any], context: RoutingContext
    ) -> dict[str, Routing] | None:
        runs = adapter in self.running
        cache, past = cache_of(call), past_length(call)
        # An architecture's own cache has no room for the decision; a generation then holds it as without one.
        alone = past == 0 or not isinstance(cache, Cache)
        if self.pinned and adapter in self.pinned and alone and not runs:
            return self.pinned[adapter]
        if context.prompt is not None and (past == 0 or not runs):
            return None  # the caller marks a prompt: a new turn, a new decision
        if past > 0:
            state = find_state(cache, adapter)
            if state is None or state.decisions is None:
                raise PeftMoeError(
                    f"adapter {adapter!r} decides once per prompt, and this KV cache holds no decision of "
                    "it; fill the cache with this adapter active, or mark the prompt with routing_inputs()"
                )
            return state.decisions
        return None

    def _refuse_late_prompt(self, adapter: str, call: dict[str, Any], once: bool) -> None:
        # The bare base has no keys of the cached tokens: a probe of the new ones alone would misread them.
        if once and past_length(call) > 0:
            raise PeftMoeError(
                f"adapter {adapter!r}: a new prompt on a filled KV cache cannot be probed with "
                "router_below_tap='probe'; pass the whole text without cache, or use router_below_tap='base'"
            )

    def _probe_cache(
        self, model: nn.Module, adapter: str, call: dict[str, Any], context: RoutingContext
    ) -> DynamicCache | None:
        # A decision per token needs the base's own keys below the tap in every decoding step.
        if not fills_cache(model, call):
            return None
        state = find_state(cache_of(call), adapter)
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
        if context.gates is not None or self.disable_adapters:
            return
        for adapter in self.adapters_now():
            tap = self.taps.get(adapter)
            if tap is None or tap.layer is not layer or tap.below == "probe":
                continue
            if adapter in context.shared and adapter not in context.retake:
                continue
            router = self.molora_router[adapter]
            if (router.pools or router.runs) and tap.below == "base":
                decide = partial(self._ask, router, hidden_BTI, context)
                routing = context.decide(adapter, MODEL_SEAT, decide)
            else:
                routing = router(hidden_BTI, context)
            self._settle(adapter, routing, context)

    @staticmethod
    def _ask(router: Router, hidden: Tensor, context: RoutingContext, before: Tensor | None) -> Routing:
        routing: Routing = router(hidden, context, before=before)
        return routing

    def _settle(self, adapter: str, routing: Routing, context: RoutingContext) -> None:
        # What is kept is the router's own decision: later steps may allow something else.
        routing = self.molora_router[adapter].limited(routing, context.limits.get(adapter), context)
        context.shared[adapter] = routing
        report(f"{MODEL_SEAT}.{adapter}", routing)

    def _end(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        context = current_context()
        if context is None or context.probing:
            return
        leave_context()
        if output is None:
            return  # the call failed
        cache = returned_cache(output, named_arguments(model, args, kwargs))
        for adapter in {*context.decided, *context.probe_caches}:
            self._keep(adapter, cache, context)

    def _keep(self, adapter: str, cache: Any, context: RoutingContext) -> None:
        state = RouterState(adapter)
        if adapter in context.decided:
            # A later step continues the last turn.
            state.decisions = {
                name: _last(routing, context.kept.get(adapter, {}).get(name))
                for name, routing in context.decided[adapter].items()
            }
            if self.pinned is not None:
                self.pinned.setdefault(adapter, state.decisions)
        earlier = find_state(cache, adapter)
        running_probe = earlier.probe_cache if earlier is not None else None
        state.probe_cache = context.probe_caches.get(adapter, running_probe)
        attach_state(cache, state)


def _last(routing: Routing, kept: Routing | None) -> Routing:
    """What a later step needs of a decision: its last token's, and the summaries that led there."""
    running = routing.running
    if running is not None and kept is not None and kept.running is not None:
        running = torch.cat([kept.running, running], dim=1)
    last = routing.replace(running=None).detach().map(lambda t: t[:, -1:])
    return last if running is None else last.replace(running=running[:, -REMEMBERED:])


def _no_hidden(router: Router, context: RoutingContext) -> Tensor:
    """Stands for the hidden states of a router that does not read them."""
    known = (context.input_ids, context.real, context.domains)
    device = next((t.device for t in known if t is not None), torch.device("cpu"))
    return torch.zeros(1, 1, router.in_features, device=device)


def model_decision(adapter: str, layer_name: str, *, below_tap: bool) -> Routing:
    """The decision that scope "model" took for the running forward pass.

    Args:
        adapter: the adapter's name.
        layer_name: for messages.
        below_tap: whether the layer follows the prompt's decision, since it lies below the tap.

    Raises:
        PeftMoeError: none was taken: the part that was called is not the model that carries the
            mixture, or the layer lies below a tap that is read in the same pass.
    """
    context = current_context()
    key = below(adapter) if below_tap else adapter
    if context is None or key not in context.shared:
        raise PeftMoeError(
            f"{layer_name}: router_scope='model' has taken no decision; call the whole model, not a "
            "part of it"
        )
    return context.shared[key]
