"""How a layer, or a feed-forward network, comes by its decision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ...errors import PeftMoeError
from ...routers import Router
from ...routing.context import Routing, RoutingContext
from .model_router import model_decision
from .resolve_controls import refuse_unheard
from .shared_router import block_decision, take_decision

if TYPE_CHECKING:
    from ..config.mixture import MoLoraConfig


@dataclass(frozen=True)
class Decider:
    """Who decides at one place of the base.

    Attributes:
        config: of the mixture; the number of its experts may change in it.
        scope: "module": the place's own router; "block": that of the running block; "model".
        below_tap: the place follows the prompt's decision of scope "model".
    """

    config: MoLoraConfig
    scope: str
    below_tap: bool = False

    def decide(
        self, adapter: str, name: str, x: Tensor, router: Router | None, context: RoutingContext | None
    ) -> Routing:
        """The decision for the running call.

        Args:
            adapter: the adapter's name.
            name: of the place.
            x: its input, [..., I].
            router: its own, for scope "module".
            context: of the running call.

        Raises:
            PeftMoeError: gates of another length were given, or nobody decides in this call.
        """
        if context is None:
            refuse_unheard(name)
        elif context.gates is not None:
            return self._given(context.gates)
        if self.scope == "model":
            return model_decision(adapter, name, below_tap=self.below_tap)
        tokens_BTI = x if x.dim() == 3 else x.reshape(*_rows(name, x, context), x.shape[-1])
        if self.scope == "block":
            return block_decision(adapter, tokens_BTI, name, context)
        assert router is not None, "scope 'module' has a router at each place"
        return take_decision(router, adapter, name, tokens_BTI, context)

    def _given(self, gates_B1E: Tensor) -> Routing:
        experts = self.config.num_experts
        if gates_B1E.shape[-1] != experts:
            raise PeftMoeError(
                f"gates for {gates_B1E.shape[-1]} experts were given, this mixture has {experts}; "
                "give one weight for each"
            )
        return Routing(gates=gates_B1E)


def _rows(name: str, x: Tensor, context: RoutingContext | None) -> tuple[int, int]:
    """B and T of flat tokens; loose ones, as a sparse base's expert is given, are one row."""
    tokens = x.numel() // x.shape[-1]
    shape = context.shape if context is not None else None
    if shape is not None and shape[0] * shape[1] == tokens and ".experts." not in name:
        return shape
    return 1, tokens
