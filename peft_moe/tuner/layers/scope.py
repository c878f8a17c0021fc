"""Who decides at one place of the base, and what becomes of the decision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ...errors import PeftMoeError
from ...routers import Router
from ...routing.context import Routing, RoutingContext, below, current_request
from .resolve_controls import refuse_controls
from .shared_router import running_block

if TYPE_CHECKING:
    from ..config.mixture import MoLoraConfig


@dataclass(frozen=True)
class RoutingScope:
    """Who decides at one place of the base: a linear layer, or a feed-forward network.

    Attributes:
        adapter: the mixture's name.
        name: of the place.
        config: of the mixture; the number of its experts may change in it.
        scope: "module": the place's own router; "block": that of the running block; "model".
        below_tap: the place follows the prompt's decision of scope "model".
    """

    adapter: str
    name: str
    config: MoLoraConfig
    scope: str
    below_tap: bool = False

    def decide(self, x: Tensor, router: Router | None, context: RoutingContext | None) -> Routing:
        """The decision for the running call.

        Args:
            x: the input of the place, [..., I].
            router: its own, for scope "module".
            context: of the running pass; None where the place runs outside of the whole model.

        Raises:
            PeftMoeError: the caller's gates have another length, or no router decides in this call.
        """
        if context is None:
            refuse_controls(self.name)
        elif context.gates is not None:
            return self._fixed(context.gates)
        if self.scope == "model":
            return self._of_model(context)
        tokens_BTI = x if x.dim() == 3 else x.reshape(*self._rows(x, context), x.shape[-1])
        if self.scope == "block":
            return self._of_block(tokens_BTI, context)
        assert router is not None, "scope 'module' has a router at each place"
        return ask(router, self.adapter, self.name, tokens_BTI, context)

    def _fixed(self, gates_B1E: Tensor) -> Routing:
        experts = self.config.num_experts
        if gates_B1E.shape[-1] != experts:
            raise PeftMoeError(
                f"gates for {gates_B1E.shape[-1]} experts were given, this mixture has {experts}; "
                "give one weight for each"
            )
        return Routing(gates=gates_B1E)

    def _of_model(self, context: RoutingContext | None) -> Routing:
        """The decision that scope "model" took for the running forward pass."""
        key = below(self.adapter) if self.below_tap else self.adapter
        if context is None or key not in context.model_decisions:
            raise PeftMoeError(
                f"{self.name}: router_scope='model' has taken no decision; call the whole model, not a "
                "part of it"
            )
        return context.model_decisions[key]

    def _of_block(self, tokens_BTI: Tensor, context: RoutingContext | None) -> Routing:
        """The decision of the block that runs, taken from this input if the layer is the first to ask."""
        call = running_block()
        if call is None or self.adapter not in call.block.molora_router:
            raise PeftMoeError(
                f"{self.name}: router_scope='block' found no running block; call the block itself, not its "
                "`forward`, or use router_scope='module'"
            )
        key = (self.adapter, tuple(tokens_BTI.shape[:-1]))
        if key not in call.decisions:
            router: Router = call.block.molora_router[self.adapter]  # type: ignore[assignment]  # of a ModuleDict
            if tokens_BTI.shape[-1] != router.in_features:
                raise PeftMoeError(
                    f"{self.name}: its input has {tokens_BTI.shape[-1]} features, the router of block "
                    f"{call.block.name} reads {router.in_features}; use router_scope='module'"
                )
            call.decisions[key] = ask(router, self.adapter, call.block.name, tokens_BTI, context)
        return call.decisions[key]

    def _rows(self, x: Tensor, context: RoutingContext | None) -> tuple[int, int]:
        """B and T of flat tokens; those that a sparse base hands to one of its experts are one row."""
        tokens = x.numel() // x.shape[-1]
        shape = context.shape if context is not None else None
        if shape is not None and shape[0] * shape[1] == tokens and ".experts." not in self.name:
            return shape
        return 1, tokens


def ask(router: Router, adapter: str, name: str, x_BTI: Tensor, context: RoutingContext | None) -> Routing:
    """Ask a router, or follow its decision of an earlier step, within what the caller allows.

    Args:
        router: of a module, a block or the model.
        adapter: the mixture's name.
        name: the name under which the router's decisions are kept and recorded.
        x_BTI: what the router reads.
        context: of the running pass.
    """
    if context is not None and (router.pools or router.runs):
        routing = context.decide(adapter, name, lambda before: router(x_BTI, context, before=before))
    else:
        routing = router(x_BTI, context)
    if context is not None and context.recorder is None and not context.constraints:
        return routing
    return settle(router, adapter, name, routing, context)


def settle(
    router: Router, adapter: str, name: str, routing: Routing, context: RoutingContext | None
) -> Routing:
    """Apply the caller's constraints to a router's decision, and record the result.

    Later steps continue the router's own decision: they may have other constraints.
    """
    if context is None:
        recorder = current_request().recorder
    else:
        recorder = context.recorder
        if context.constraints:
            routing = router.constrain(routing, context.constraints.get(adapter), context)
    if recorder is not None:
        recorder.add(name, routing, context)
    return routing
