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
from .running import running_features
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
        # DeepSeek-V3's balancing bias (arXiv 2408.15664): moved by the trainer, not by gradients, and saved.
        self.balance_bias: Tensor | None
        bias_X = torch.zeros(settings.num_columns) if settings.bias_update_rate > 0 else None
        self.register_buffer("balance_bias", bias_X)

    @property
    def reads_input(self) -> bool:
        """False if the gates are the same for every input, so that the mixture can be merged."""
        return self.scorer.reads_input

    @property
    def reads_hidden(self) -> bool:
        """False if only the call (labels, token ids) or nothing at all decides, not the hidden states."""
        return self.scorer.reads_input and self.scorer.reads_hidden

    @property
    def trainable(self) -> bool:
        """False if the scorer's weights are to stay as they are."""
        return self.scorer.trainable

    @property
    def pools(self) -> bool:
        """Whether there is one decision per prompt, taken from its pooled hidden states."""
        return self.settings.granularity == "sequence" and self.reads_hidden

    @property
    def runs(self) -> bool:
        """Whether its decisions start from the prompt and follow the text."""
        return self.settings.granularity == "running" and self.reads_hidden

    def forward(
        self,
        x: Tensor,
        context: RoutingContext | None = None,
        *,
        pool: bool = False,
        before: Tensor | None = None,
    ) -> Routing:
        """Decide.

        Args:
            x: the routed tokens, [B, T, I].
            context: the running forward pass; a router that pools over prompts needs it.
            pool: decide once per prompt, also where the router decides per token elsewhere.
            before: the summary of the text that this call continues, [B, I].

        Returns:
            A :class:`Routing`: [B, T, ·], [B, 1, ·] for one decision per sequence, or [1, 1, ·].
        """
        with torch.autocast(device_type=x.device.type, enabled=False):
            pool = pool or self.pools
            features_BTI = self.features(x, context, pool=pool, before=before)
            logits_BTX = self.scorer.score(features_BTI, context)
            real_BT = context.real if context is not None else None
            routing = select(logits_BTX, self.settings, bias_X=self.balance_bias, real_BT=real_BT)
            if self.runs and not pool:
                routing.running = features_BTI.detach()
            return spread_turns(routing, context) if pool and context is not None else routing

    def features(
        self,
        x: Tensor,
        context: RoutingContext | None = None,
        *,
        pool: bool = False,
        before: Tensor | None = None,
    ) -> Tensor:
        """What the scorer sees: [B, T, I], or [B, S, I] pooled over prompts; float32 or wider.

        Fitting a router without gradients fits it on exactly this.
        """
        # A float64 model gets float64 decisions; nothing gets fewer than 32 bits.
        wide_BTI = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.settings.input_norm:
            wide_BTI = functional.rms_norm(wide_BTI, (wide_BTI.shape[-1],))
        if pool or self.pools:
            wide_BTI = pool_prompts(wide_BTI, context or RoutingContext(), self.settings.pool)
        elif self.runs:
            settings, known = self.settings, context or RoutingContext()
            wide_BTI = running_features(wide_BTI, known, settings.pool, settings.window, before)
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
