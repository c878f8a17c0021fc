"""How a forward pass of the model begins and ends.

One pre-hook on the model that was given to ``get_peft_model`` sees every way in: PeftModel, generate,
trainers, transformers' own adapters. It asks once what has one answer per pass: the caller's request, the
active mixtures, the constraints, the decisions that a KV cache carries. Layers read the answers from the
:class:`~peft_moe.routing.context.RoutingContext`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from ...errors import PeftMoeError
from ...routers.losses import active_losses
from ...routing.checkpointing import bind_checkpoints
from ...routing.context import (
    Generation,
    Request,
    Routing,
    RoutingContext,
    current_context,
    current_request,
    enter_context,
    leave_context,
    requesting,
)
from ...routing.kv_cache import REMEMBERED, CachedRouting, attach_routing, find_routing
from ...routing.mixed_batch import mixed_batch, named_adapters
from ...routing.model_call import (
    cache_of,
    generates,
    named_arguments,
    past_length,
    prompt_shape_of,
    read_call,
    returned_cache,
)
from ..config.mixture import MoLoraConfig
from .model_router import ModelRouter
from .resolve_controls import apply_controls, refuse_company

# Fields that ask for a loss or for steps of a trainer, beside those of the losses on decisions.
_TRAINER_FIELDS = ("expert_orthogonality_coef", "distillation_coef", "router_bias_update_rate")


def outlives_call(config: MoLoraConfig) -> bool:
    """Whether the decisions of a mixture hold for later calls: one per prompt, or running ones."""
    return config.router_granularity != "token" or config.router_below_tap == "prompt"


class ForwardPass:
    """The hooks that open and close each forward pass of a model with mixtures.

    Attributes:
        router: the model's router, which PEFT's switches (active adapters, disabling) reach.
        warned: adapters whose user has been warned of losses that no trainer adds.
    """

    def __init__(self, model: nn.Module, router: ModelRouter) -> None:
        self.router = router
        self.warned: set[str] = set()
        router.handles += [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running = current_context()
        if running is not None and running.probing:
            return  # the base alone, on the way to a tap
        call, request = named_arguments(model, args, kwargs), current_request()
        # Only decisions that outlive a call need the prompt's turns, whose number is read back from the
        # device. A traced call cannot branch on that number.
        turns = any(map(outlives_call, self.router.mixtures.values())) or not torch.compiler.is_compiling()
        context = read_call(call, request, causal=generates(model), count_turns=turns)
        context.adapters, context.row_adapters = self.router.active_adapters, request.row_adapters
        if request.row_adapters is not None:
            context.adapters = named_adapters(request.row_adapters)
        active = {} if self.router.disable_adapters else self._active(context.adapters)
        if len(active) > 1 or request.row_adapters is not None:
            refuse_company(active, request.row_adapters)
        if request.controls is not None or request.inputs is not None:
            apply_controls(context, request, active)
        enter_context(context)
        if model.training:
            bind_checkpoints(model)
            if request.recorder is None and torch.is_grad_enabled():
                self._warn_of_losses(active)
        if context.gates is not None:
            return  # no router is asked
        for adapter, config in active.items():
            if outlives_call(config):
                self._continue(adapter, config, call, context)
            if adapter in self.router.molora_router:
                self.router.prepare(model, adapter, call, context)

    def _active(self, adapters: Sequence[str]) -> dict[str, MoLoraConfig]:
        return {
            adapter: self.router.mixtures[adapter] for adapter in adapters if adapter in self.router.mixtures
        }

    def _warn_of_losses(self, active: dict[str, MoLoraConfig]) -> None:
        # Trainers compute the loss from the outputs, and would leave the auxiliary losses out in silence.
        for adapter, config in active.items():
            if adapter in self.warned:
                continue
            fields = [*active_losses(config), *(name for name in _TRAINER_FIELDS if getattr(config, name))]
            if fields:
                self.warned.add(adapter)
                warnings.warn(
                    f"{fields[-1]} of adapter {adapter!r} has no effect here: nobody adds router losses. "
                    "Train with peft_moe.training.MoLoraSFTTrainer, or put RouterTrainerMixin first",
                    stacklevel=2,
                )

    def _continue(
        self, adapter: str, config: MoLoraConfig, call: dict[str, Any], context: RoutingContext
    ) -> None:
        """Find the decisions of an earlier call that this one continues."""
        runs, cache, past = config.router_granularity == "running", cache_of(call), past_length(call)
        generation = context.generation
        # An architecture's own cache has no room for the decision, which the generation then keeps.
        alone = past == 0 or not isinstance(cache, Cache)
        if generation is not None and adapter in generation.decisions and alone and not runs:
            context.cached_decisions[adapter] = generation.decisions[adapter]
            return
        if context.prompt is not None and (past == 0 or not runs):
            return  # the caller marks a prompt: a new turn, a new decision
        if past == 0:
            return
        cached = find_routing(cache, adapter)
        if cached is None or cached.decisions is None:
            raise PeftMoeError(
                f"adapter {adapter!r} decides once per prompt, and this KV cache holds no decision of "
                "it; fill the cache with this adapter active, or mark the prompt with routing_inputs()"
            )
        context.cached_decisions[adapter] = cached.decisions

    def _end(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        context = current_context()
        if context is None or context.probing:
            return
        leave_context()
        adapters = {*context.new_decisions, *context.probe_caches}
        if output is None or not adapters:
            return  # the call failed, or took no decision that outlives it
        cache = returned_cache(output, named_arguments(model, args, kwargs))
        for adapter in adapters:
            _keep(adapter, cache, context)


def _keep(adapter: str, cache: Any, context: RoutingContext) -> None:
    """Put the decisions of a pass where the next one finds them: into the KV cache and the generation."""
    routing = CachedRouting(adapter)
    if adapter in context.new_decisions:
        # A later step continues the last turn.
        routing.decisions = {
            name: _last(decision, context.cached_decisions.get(adapter, {}).get(name))
            for name, decision in context.new_decisions[adapter].items()
        }
        if context.generation is not None:
            context.generation.decisions.setdefault(adapter, routing.decisions)
    earlier = find_routing(cache, adapter)
    probe_cache = earlier.probe_cache if earlier is not None else None
    routing.probe_cache = context.probe_caches.get(adapter, probe_cache)
    attach_routing(cache, routing)


def _last(decision: Routing, cached: Routing | None) -> Routing:
    """What a later step needs of a decision: that of the last token, and the summaries that led to it."""
    running = decision.running
    if running is not None and cached is not None and cached.running is not None:
        running = torch.cat([cached.running, running], dim=1)
    last = decision.replace(running=None).detach().map(lambda t: t[:, -1:])
    return last if running is None else last.replace(running=running[:, -REMEMBERED:])


class UserCalls:
    """The part of the tuner that PEFT enters around each call of a user."""

    model: nn.Module

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT enters this around one forward pass or one whole generation. A decision per prompt holds for
        # all of it, also where no KV cache carries the decision along.
        names, now = kwargs.get("adapter_names"), current_request()
        generation = Generation(prompt_shape_of(args, kwargs))
        # Written out: the compiler's tracer does not follow dataclasses.replace.
        request = Request(now.controls, now.inputs, now.recorder, now.row_adapters, generation)
        with (
            requesting(request),
            nullcontext() if names is None else mixed_batch(self.model, names, (*args, *kwargs.values())),
        ):
            yield
