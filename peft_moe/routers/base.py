"""A router: input normalisation, pooling, scorer and selector in a row, always in float32.

Letters: B batch, T sequence, S turns, I in, X experts plus the null expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..routing import Routing, RoutingContext
from .pooling import pool_prompts, spread_turns
from .registry import scorer_class
from .selectors import select
from .settings import RouterSettings


class Router(nn.Module):
    """Takes the decisions of one module, one block or one model.

    Its weights stay float32 whatever the model is cast to: bf16 scores change the chosen experts of
    up to 2 % of the tokens, and bf16 steps of a small learning rate round to nothing.
    """

    def __init__(self, settings: RouterSettings, in_features: int) -> None:
        super().__init__()
        self.settings = settings
        self.in_features = in_features
        self.scorer = scorer_class(settings.scorer)(settings, in_features)

    @property
    def reads_input(self) -> bool:
        """False if the gates are the same for every input, so that the mixture can be merged."""
        return self.scorer.reads_input

    @property
    def trainable(self) -> bool:
        """False if the scorer's weights are to stay as they are."""
        return self.scorer.trainable

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:
        """Decide.

        Args:
            x: the routed tokens, [B, T, I].
            context: the running forward pass; a router that pools over prompts needs it.

        Returns:
            A :class:`Routing`: [B, T, ·], [B, 1, ·] for one decision per sequence, or [1, 1, ·].
        """
        with torch.autocast(device_type=x.device.type, enabled=False):
            features_BTI = self.features(x, context)
            routing = select(self.scorer(features_BTI), self.settings)
            if self.settings.granularity == "sequence" and self.reads_input and context is not None:
                routing = spread_turns(routing, context)
            return routing

    def features(self, x: Tensor, context: RoutingContext | None = None) -> Tensor:
        """What the scorer sees: [B, T, I], or [B, S, I] pooled over prompts; float32 or wider.

        Fitting a router without gradients fits it on exactly this.
        """
        # A float64 model gets float64 decisions; nothing gets fewer than 32 bits.
        wide_BTI = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.settings.input_norm:
            wide_BTI = functional.rms_norm(wide_BTI, (wide_BTI.shape[-1],))
        if self.settings.granularity == "sequence" and self.reads_input:
            wide_BTI = pool_prompts(wide_BTI, context or RoutingContext(), self.settings.pool)
        return wide_BTI

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Follow the model to another device, but not to a narrower dtype."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.is_floating_point() and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]  # torch's own
        return self
