"""A router: input normalisation, pooling, scorer and selection in a row, in float32 or wider.

Letters: B batch, T sequence, S turns, I in, X experts plus the null expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PeftMoeError
from ..io.offload import read
from ..routing.cached_submodules import cache_submodules
from ..routing.context import Routing, RoutingConstraints, RoutingContext
from ..routing.controls import NO_EXPERT, ROUTER
from .fp32_linear import UpcastCache, fp32_linear, widened
from .pooling import pool_prompts, spread_turns
from .running import running_features
from .scorer import scorer_class
from .selection import choose, constant, select
from .settings import RouterSettings


class Router(nn.Module):
    """The router of one module, one block or one model.

    Its weights stay float32 when the model is cast: bf16 scores change the chosen experts of up to 2 % of
    the tokens, and bf16 rounds the steps of a small learning rate to zero.
    """

    def __init__(self, settings: RouterSettings, in_features: int) -> None:
        super().__init__()
        self.settings = settings
        self.in_features = in_features
        self.scorer = scorer_class(settings.scorer)(settings, in_features)
        cache_submodules(self, "scorer")
        self._scorer_is_linear = self.scorer.is_linear
        # Whether it decides once per prompt, from the pooled hidden states; and whether it starts from the
        # prompt and follows the text.
        self.pools = settings.granularity == "sequence" and self.reads_hidden
        self.runs = settings.granularity == "running" and self.reads_hidden
        # DeepSeek-V3's balancing bias (arXiv 2408.15664). The trainer changes it, without gradients; it is
        # saved.
        self.balance_bias: Tensor | None
        bias_X = torch.zeros(settings.num_columns) if settings.bias_update_rate > 0 else None
        self.register_buffer("balance_bias", bias_X)

    @property
    def reads_input(self) -> bool:
        """Whether the gates depend on the input. If not, the mixture can be merged."""
        return self.scorer.reads_input

    @property
    def reads_hidden(self) -> bool:
        """Whether the gates depend on hidden states, and not only on the call (labels, token ids)."""
        return self.scorer.reads_input and self.scorer.reads_hidden

    @property
    def trainable(self) -> bool:
        """Whether the scorer's weights train."""
        return self.scorer.trainable

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
            context: of the running forward pass; a router that pools over prompts needs it.
            pool: decide once per prompt, also if the router decides per token in other layers.
            before: the summary of the text that this call continues, [B, I].

        Returns:
            A :class:`Routing`: [B, T, ·], [B, 1, ·] for one decision per sequence, or [1, 1, ·].
        """
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return self._decide(x, context, pool or self.pools, before)
        with torch.autocast(device_type=device, enabled=False):
            return self._decide(x, context, pool or self.pools, before)

    def _decide(
        self, x: Tensor, context: RoutingContext | None, pool: bool, before: Tensor | None
    ) -> Routing:
        # A compiler decides by itself which float32 copies are made and kept.
        direct = self._scorer_is_linear and not (pool or self.runs or torch.compiler.is_compiling())
        if direct:
            logits_BTX = self._linear_scores(x, context)
        else:
            features_BTI = self.features(x, context, pool=pool, before=before)
            logits_BTX = self.scorer.score(features_BTI, context)
        real_BT = context.real if context is not None else None
        routing = select(logits_BTX, self.settings, bias_X=self.balance_bias, real_BT=real_BT)
        if self.runs and not pool:
            routing.running = features_BTI.detach()
        return spread_turns(routing, context) if pool and context is not None else routing

    def _linear_scores(self, x: Tensor, context: RoutingContext | None) -> Tensor:
        """Scores straight from ``x``: no float32 copy of all of it is made, or kept for the backward pass."""
        scorer: Any = self.scorer
        weight_XI, bias_X = scorer.weight, getattr(scorer, "bias", None)
        if weight_XI.is_meta:  # accelerate keeps it elsewhere between calls
            weight_XI, bias_X = read(scorer), None if bias_X is None else read(scorer, "bias")
        if context is not None:
            # The other layers of this pass that read the same small input use this copy of it.
            if context.upcasts is None:
                context.upcasts = UpcastCache()
            fp32_BTI = context.upcasts.make(x)
            x = x if fp32_BTI is None else fp32_BTI
        return fp32_linear(x, weight_XI, bias_X, self.settings.input_norm)

    def constrain(
        self, routing: Routing, constraints: RoutingConstraints | None, context: RoutingContext | None
    ) -> Routing:
        """A decision of this router within what the caller allows, from the scores that it holds.

        Args:
            routing: as :meth:`forward` returned it, maybe in an earlier step.
            constraints: of the running pass; None leaves the decision as it is.
            context: of the running pass.

        Raises:
            PeftMoeError: rows were named, and this router saw something else than whole sequences.
        """
        if constraints is None or routing.logits is None:
            return routing
        if constraints.masked_columns or constraints.score_scale != 1:
            chosen = choose(
                routing.logits,
                self.settings,
                bias_X=self.balance_bias,
                real_BT=context.real if context is not None else None,
                masked_columns=constraints.masked_columns,
                score_scale=constraints.score_scale,
            )
            routing = chosen.replace(running=routing.running)
        if constraints.masked_shared:
            routing = _without(routing, constraints.masked_shared)
        if constraints.rows is not None:
            routing = self._named_rows(routing, constraints.rows, context)
        return routing

    def _named_rows(self, routing: Routing, rows_B: Tensor, context: RoutingContext | None) -> Routing:
        """Give each row whose expert the caller names that expert alone. Other rows do not change."""
        gates = routing.gates
        rows_B = rows_B.to(gates.device)
        if gates.shape[0] not in (1, len(rows_B)) or (
            gates.shape[0] == 1 and gates.shape[1] > 1 < len(rows_B)
        ):
            shape = context.shape if context is not None else None
            if shape is None or gates.shape[0] * gates.shape[1] != shape[0] * shape[1]:
                raise PeftMoeError(
                    f"experts names one expert for each of {len(rows_B)} sequences, and this router decided "
                    f"for {tuple(gates.shape[:2])} tokens; use router_scope='model', or leave the layer out "
                    "of target_modules"
                )
            rows_B = rows_B.repeat_interleave(gates.shape[1] // len(rows_B))
            known_BT1 = (rows_B != ROUTER)[None, :, None]
            rows_BT = rows_B[None]
        else:
            known_BT1, rows_BT = (rows_B != ROUTER)[:, None, None], rows_B[:, None]
        experts_E = torch.arange(self.settings.num_experts, device=gates.device)
        own_BTE = rows_BT[..., None] == experts_E
        gates = torch.where(known_BT1, own_BTE.to(gates.dtype), gates)
        selected = routing.selected
        if selected is not None:
            routed_X = constant(self.settings.routed, gates.device)
            chosen_BTX = rows_BT[..., None] == routed_X
            if self.settings.null_expert:
                chosen_BTX = torch.cat([chosen_BTX, (rows_BT == NO_EXPERT)[..., None]], dim=-1)
            selected = torch.where(known_BT1, chosen_BTX, selected)
        # Named rows have one expert, others have k: not the sparse form.
        return routing.replace(gates=gates, selected=selected, expert_ids=None, expert_weights=None)

    def features(
        self,
        x: Tensor,
        context: RoutingContext | None = None,
        *,
        pool: bool = False,
        before: Tensor | None = None,
    ) -> Tensor:
        """Return the input of the scorer: [B, T, I], or [B, S, I] pooled over prompts; float32 or wider.

        A fit without gradients reads the same features.
        """
        fp32_BTI = widened(x, self.settings.input_norm)
        if pool or self.pools:
            fp32_BTI = pool_prompts(fp32_BTI, context or RoutingContext(), self.settings.pool)
        elif self.runs:
            settings, known = self.settings, context or RoutingContext()
            fp32_BTI = running_features(fp32_BTI, known, settings.pool, settings.window, before)
        return fp32_BTI

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Follow the model to another device, but keep the dtype."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.is_floating_point() and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]  # torch's own
        return self


def _without(routing: Routing, experts: tuple[int, ...]) -> Routing:
    """Return the decision with gates of zero for these experts."""
    ids, weights = routing.expert_ids, routing.expert_weights
    if ids is None or weights is None:
        hidden = constant(experts, routing.gates.device)
        return routing.replace(gates=routing.gates.index_fill(-1, hidden, 0.0))
    hidden = constant(experts, ids.device)
    # The dense gates follow from the weights that are left.
    return routing.replace(gates=None, expert_weights=weights.masked_fill(torch.isin(ids, hidden), 0.0))
