"""Routers of scope "model": one decision for all layers, from the hidden states at a tap.

A tap is the input of one decoder layer. A router reads it in one of three ways:

- below_tap="base": the layers below the tap stay unadapted, so that the tap is read in the same pass;
- below_tap="probe": the bare base first runs up to the tap and stops there. For a decision per prompt
  that happens at prefill only; for one per token in every step, with a small KV cache of its own;
- below_tap="prompt", for decisions per token: the layers below the tap follow a decision pooled over the
  prompt, from a probe at prefill only, and the tap is read in the same pass for the layers above.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ...errors import PeftMoeError
from ...routers import Router
from ...routing.checkpointing import refuse_reentrant
from ...routing.context import Routing, RoutingContext, below, current_context
from ...routing.kv_cache import find_routing
from ...routing.model_call import cache_of, fills_cache, past_length
from ..config.mixture import MoLoraConfig
from .probe import TapReached, run_probe
from .scope import ask, settle
from .shared_router import MODEL_ROUTER, SharedRouter
from .tap import Tap


class ModelRouter(SharedRouter):
    """The routers of scope "model", one per adapter.

    PEFT knows it as a layer without a base, so that its switches (active adapters, disabling) reach it. Every
    model with mixtures has one, also where it holds no router.
    """

    other_param_names = ("taps", "mixtures")

    def __init__(self) -> None:
        super().__init__(MODEL_ROUTER)
        self.taps: dict[str, Tap] = {}
        # The config of every mixture of the model, by adapter.
        self.mixtures: dict[str, MoLoraConfig] = {}

    def add_model_router(self, adapter: str, router: Router, tap: Tap) -> None:
        """Take in a router of scope "model", and watch its tap."""
        self.add_router(adapter, router)
        self.taps[adapter] = tap
        if router.reads_hidden:
            self.handles.append(tap.layer.register_forward_pre_hook(self._at_tap, with_kwargs=True))

    def _home(self, adapter: str) -> nn.Module | None:
        return self.taps[adapter].layer if adapter in self.taps else None

    def _router(self, adapter: str) -> Router:
        router: Router = self.molora_router[adapter]  # type: ignore[assignment]  # of a ModuleDict
        return router

    def prepare(self, model: nn.Module, adapter: str, call: dict[str, Any], context: RoutingContext) -> None:
        """Before a pass: take the decision that does not wait for the tap.

        Args:
            model: the model that carries the mixture.
            adapter: the mixture's name.
            call: the arguments of the pass, by name.
            context: of the pass.
        """
        router, tap = self._router(adapter), self.taps[adapter]
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

        outlives = once or router.runs
        routing = context.decide(adapter, MODEL_ROUTER, probe) if outlives else probe()
        if tap.below == "prompt":
            constraints = context.constraints.get(adapter)
            context.model_decisions[below(adapter)] = router.constrain(routing, constraints, context)
        else:
            self._settle(adapter, routing, context)

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
        cached = find_routing(cache_of(call), adapter)
        if cached is not None and cached.probe_cache is not None:
            return cached.probe_cache
        if past_length(call) > 0:
            raise PeftMoeError(
                f"adapter {adapter!r} probes the base in every step, and this KV cache was filled without "
                "it; fill the cache with this adapter active"
            )
        cache = DynamicCache(config=model.config.get_text_config())  # type: ignore[union-attr,operator]  # transformers' config
        context.probe_caches[adapter] = cache
        return cache

    def _at_tap(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook: a decoder layer is about to read the hidden states at the tap."""
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
        for adapter in context.adapters:
            tap = self.taps.get(adapter)
            if tap is None or tap.layer is not layer or tap.below == "probe":
                continue
            if adapter in context.model_decisions and adapter not in context.retake:
                continue
            router = self._router(adapter)
            if tap.below == "base":
                name = f"{MODEL_ROUTER}.{adapter}"
                context.model_decisions[adapter] = ask(router, adapter, name, hidden_BTI, context)
            else:
                self._settle(adapter, router(hidden_BTI, context), context)

    def _settle(self, adapter: str, routing: Routing, context: RoutingContext) -> None:
        name = f"{MODEL_ROUTER}.{adapter}"
        context.model_decisions[adapter] = settle(self._router(adapter), adapter, name, routing, context)


def _no_hidden(router: Router, context: RoutingContext) -> Tensor:
    """A stand-in for the hidden states of a router that does not read them."""
    tensors = (context.input_ids, context.real, context.domains)
    device = next((t.device for t in tensors if t is not None), torch.device("cpu"))
    return torch.zeros(1, 1, router.in_features, device=device)
