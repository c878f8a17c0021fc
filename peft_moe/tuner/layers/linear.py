"""A linear layer of the base with a gated mixture of LoRA experts on it.

The base layer is a black box: nn.Linear, GPT-2's Conv1D, and every quantised linear that gives its
sizes. Letters: N tokens, I in, O out, R total rank, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import PeftMoeError
from ...experts.base_modules import linear_sizes
from ...io.offload import read
from ...ops import RankMap, folded_delta, mix
from ...routers import Router
from ...routing.cached_submodules import cache_submodules
from ...routing.context import Routing, RoutingContext, current_context, current_request
from ...routing.decision import per_token
from ...routing.mixed_batch import narrow, rows_of
from .expert_factors import as_linear
from .feed_forward import FeedForwardPlace, mix_in_feed_forward
from .frozen_experts import detach_frozen_rows, freeze_rows, frozen_rows
from .merging import read_weight, write_weight
from .resolve_controls import refuse_merged, refuse_passing
from .scope import RoutingScope
from .shared_router import MixtureLayer


@dataclass
class LayerMixture:
    """What one adapter's mixture is on one linear layer, beside its weights.

    Attributes:
        rank_map: which rank belongs to which expert.
        scope: who decides.
        backend: how the mixture is computed.
        ffn: the layer's place in a feed-forward network at whose output the experts are mixed
            (mixing="block"); None mixes them at this layer.
        frozen_rows: ranks of experts that stay as they are while others train, long [n]; None for none.
        constant_router: a router that other layers share, and whose gates do not depend on the input.
        pending_weights: a loaded config describes the experts, and their weights may not have arrived.
    """

    rank_map: RankMap
    scope: RoutingScope
    backend: str = "auto"
    ffn: FeedForwardPlace | None = None
    frozen_rows: Tensor | None = None
    constant_router: Any = None
    pending_weights: bool = False


class MoLoraLayer(nn.Module, MixtureLayer):
    """Experts of every adapter on one linear layer.

    A forward pass of the layer:

    1. The base layer computes its output.
    2. For each active mixture, its scope takes the decision: the layer's own router, the router of the block
       or that of the model (:class:`RoutingScope`). A router scores the input, the selection turns scores
       into gates (:mod:`peft_moe.routers`), and the caller's constraints and recorder are applied.
    3. All experts are one LoRA on one rank axis: ``h = x Aᵀ``. Every rank is multiplied by its expert's
       gate.
    4. The sum ``base + (h ∘ gates) B`` is taken once (:func:`peft_moe.ops.mix`).

    ``molora_A.<adapter>`` holds the experts' A factors on one rank axis [R, I], ``molora_B.<adapter>``
    their B factors [R, O]: expert-major and transposed against LoRA, so that an expert is one slab of
    each. Both are plain ``nn.Linear`` modules, the only containers that PEFT's casts, loaders and
    copies all leave alone.
    """

    adapter_layer_names = ("molora_A", "molora_B", "molora_router")
    other_param_names = ("mixtures",)

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        sizes = linear_sizes(self.get_base_layer())
        if sizes is None:
            raise PeftMoeError(
                f"{name} is a {type(self.get_base_layer()).__name__}, which is not linear-like; "
                "take it out of target_modules"
            )
        self.in_features, self.out_features = sizes
        self.molora_A = nn.ModuleDict()
        self.molora_B = nn.ModuleDict()
        self.molora_router = nn.ModuleDict()
        self.mixtures: dict[str, LayerMixture] = {}
        cache_submodules(self, "molora_A", "molora_B", "molora_router")
        self._start_empty()

    def add_mixture(
        self,
        mixture: LayerMixture,
        A_RI: Tensor,
        B_RO: Tensor,
        *,
        router: Router | None,
        trains: Sequence[bool],
    ) -> None:
        """Put a mixture on this layer.

        Args:
            mixture: all but its weights; its scope names the adapter.
            A_RI, B_RO: the experts' factors on one rank axis, in the dtype they came in.
            router: this layer's own router, for scope "module"; None where it is shared.
            trains: of each expert, whether it trains. If none does, all are declared frozen to PEFT, which
                then keeps them so; else the rows of those that do not are frozen.
        """
        adapter = mixture.scope.adapter
        self.molora_A[adapter] = as_linear(A_RI)
        self.molora_B[adapter] = as_linear(B_RO)
        self.mixtures[adapter] = mixture
        if router is not None:
            self.molora_router[adapter] = router
        self.set_trained(adapter, trains)

    def set_trained(self, adapter: str, trains: Sequence[bool]) -> None:
        """Say which experts train, in the mixture's order; what trains now, PEFT's switches decide."""
        frozen: tuple[str, ...] = () if any(trains) else ("molora_A", "molora_B")
        if adapter in self.molora_router and not self.molora_router[adapter].trainable:
            frozen += ("molora_router",)
        self.frozen_peft_weight_names[adapter] = frozen
        mixture = self.mixtures[adapter]
        mixture.frozen_rows = frozen_rows(mixture.rank_map, trains)
        for weight in self._stored_factors(adapter):
            freeze_rows(weight, mixture.frozen_rows)

    def _home(self, adapter: str) -> nn.Module | None:
        base_layer: nn.Module = self.get_base_layer()
        return base_layer

    def follow_base_dtype(self, adapter: str) -> None:
        """Keep an adapter's experts in the base layer's dtype, if that is one to compute in."""
        weight = getattr(self.get_base_layer(), "weight", None)
        mixture = self.mixtures.get(adapter)
        if mixture is None or mixture.pending_weights or not isinstance(weight, Tensor):
            return
        if weight.dtype in (torch.float16, torch.bfloat16):
            self.molora_A[adapter].to(weight.dtype)
            self.molora_B[adapter].to(weight.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output plus that of every active mixture; [..., I] to [..., O]."""
        disabled, merged = self._disable_adapters, self.merged_adapters
        if disabled and merged:
            self.unmerge()  # which empties the list
        base_layer: nn.Module = self.base_layer
        y = base_layer(x, *args, **kwargs)
        context = current_context()
        if merged and not disabled:
            refuse_merged(self.name, context)
        if disabled or merged or (context is not None and context.probing):
            return y
        overwrite = gives_new_memory(base_layer)
        for adapter in self.adapters_now() if context is None else context.adapters:
            if adapter in self.mixtures:
                y = self._add(adapter, x, y, context, overwrite)
        return y

    def _add(
        self, adapter: str, x: Tensor, y: Tensor, context: RoutingContext | None, overwrite: bool
    ) -> Tensor:
        """Add one mixture to ``y``, which may be overwritten if ``overwrite`` says so."""
        mixture = self.mixtures[adapter]
        if mixture.pending_weights:
            self._check_arrived(adapter)
        if mixture.ffn is not None:
            A, B = self._factors(adapter, mixture)
            return mix_in_feed_forward(mixture.ffn, x, y, A, B, mixture.rank_map, mixture.backend)
        router: Any = self.molora_router[adapter] if adapter in self.molora_router else None  # noqa: SIM401  # ModuleDict has no get
        decision = mixture.scope.decide(x, router, context)
        names = current_request().row_adapters if context is None else context.row_adapters
        if names is None:
            return self._mix(mixture, decision, x, y, context, overwrite)
        rows_n = rows_of(names, adapter, x, self.name)
        decision = narrow(decision, rows_n, x)
        return y.index_copy(0, rows_n, self._mix(mixture, decision, x[rows_n], y[rows_n], None, True))

    def _mix(
        self,
        mixture: LayerMixture,
        decision: Routing,
        x: Tensor,
        y: Tensor,
        context: RoutingContext | None,
        overwrite: bool,
    ) -> Tensor:
        tokens, adapter = x.numel() // x.shape[-1], mixture.scope.adapter
        # torch types an entry of a ModuleDict as Module, and its weight as Tensor or Module.
        A: Tensor = self.molora_A[adapter].weight  # type: ignore[assignment]  # see above
        B: Tensor = self.molora_B[adapter].weight  # type: ignore[assignment]  # see above
        if A.is_meta or mixture.frozen_rows is not None:
            A, B = self._factors(adapter, mixture)
        base_NO = y.reshape(tokens, y.shape[-1])
        upcasts = None if context is None else context.upcasts
        fp32 = None if upcasts is None else upcasts.find(x)
        gates_NE = ids_NK = weights_NK = None
        if decision.expert_ids is None:
            gates_NE = per_token(decision.gates, x, tokens)
        else:
            ids_NK = per_token(decision.expert_ids, x, tokens)
            weights_NK = per_token(decision.expert_weights, x, tokens)
        mixed_NO = mix(
            x.reshape(tokens, x.shape[-1]),
            A,
            B,
            gates_NE,
            mixture.rank_map,
            base_NO,
            expert_ids_NK=ids_NK,
            weights_NK=weights_NK,
            may_select_null=decision.may_select_null,
            backend=mixture.backend,
            overwrite=overwrite,
            fp32_NI=None if fp32 is None else fp32.reshape(tokens, -1),
        )
        in_place = mixed_NO is base_NO and y.is_contiguous()
        return y if in_place else mixed_NO.view(y.shape)

    def _stored_factors(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A [R, I] and B [R, O] as parameters, on whatever device they are."""
        A: Any = self.molora_A[adapter]
        B: Any = self.molora_B[adapter]
        return A.weight, B.weight

    def _factors(self, adapter: str, mixture: LayerMixture) -> tuple[Tensor, Tensor]:
        """A [R, I] and B [R, O] to compute with, without gradients for the experts that do not train."""
        A, B = read(self.molora_A[adapter]), read(self.molora_B[adapter])
        return detach_frozen_rows(A, B, mixture.frozen_rows)

    def _check_arrived(self, adapter: str) -> None:
        # Experts that are to be loaded start empty or as NaN, and every way of loading overwrites them whole.
        weight = read(self.molora_A[adapter])
        if weight.is_meta or bool(torch.isnan(weight.flatten()[0])):
            raise PeftMoeError(
                f"{self.name}: the config of adapter {adapter!r} describes experts whose weights were never "
                "loaded; load the folder with PeftModel.from_pretrained, or give `experts` as adapter paths"
            )
        self.mixtures[adapter].pending_weights = False

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # Experts that are to be loaded take the dtype of the file, else copying would widen or round them.
        pending = [adapter for adapter, mixture in self.mixtures.items() if mixture.pending_weights]
        for side in ("molora_A", "molora_B"):
            for adapter in pending:
                stored = state_dict.get(f"{prefix}{side}.{adapter}.weight")
                if stored is not None:
                    weight = getattr(self, side)[adapter].weight
                    weight.data = weight.data.to(stored.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def constant_gates(self, adapter: str) -> Tensor:
        """Return the gates [E] of a router that does not read its input.

        Raises:
            PeftMoeError: the gates depend on the input, or act behind the next layer: nothing can be merged.
        """
        refuse_passing(adapter)
        if self.mixtures[adapter].ffn is not None:
            raise PeftMoeError(
                f"adapter {adapter!r} mixes whole feed-forward networks (mixing='block'), whose sum is no "
                "single network, so that it cannot be merged into one weight; serve it with peft_moe "
                "imported, or use mixing='linear' with router='uniform'"
            )
        shared = self.mixtures[adapter].constant_router
        router = self.molora_router[adapter] if adapter in self.molora_router else shared  # noqa: SIM401  # ModuleDict has no get
        if router is None or router.reads_input:
            raise PeftMoeError(
                f"adapter {adapter!r} routes by its input, so it cannot be merged into one weight; "
                "serve it with peft_moe imported, or use router='uniform', whose gates are constant"
            )
        weight = self._stored_factors(adapter)[0]
        # The dtype of a forward pass: float32 for the model's decision, else at least that of the input.
        dtype = torch.float32 if self.mixtures[adapter].scope.scope == "model" else weight.dtype
        dtype = torch.promote_types(dtype, torch.float32)
        probe_11I = torch.zeros(1, 1, self.in_features, device=weight.device, dtype=dtype)
        gates_E: Tensor = router(probe_11I).gates.reshape(-1)
        return gates_E

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the weight change of a mixture with constant gates, in the base weight's orientation."""
        delta_OI = folded_delta(
            *self._stored_factors(adapter),
            self.constant_gates(adapter),
            self.mixtures[adapter].rank_map,
        )
        return delta_OI.T if isinstance(self.get_base_layer(), Conv1D) else delta_OI

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add constant-gate mixtures to the base weight; PEFT's contract.

        Args:
            safe_merge: check the merged weight for NaN and infinity before it replaces the old one.
            adapter_names: which; None merges the active ones.

        Raises:
            PeftMoeError: gates that depend on the input, or non-finite merged weights.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.molora_A:
                continue
            weight = read_weight(self)
            merged = weight + self.get_delta_weight(adapter).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise PeftMoeError(
                    f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken: in "
                    f"{self.name} it gives NaN or infinity; check its experts and its router"
                )
            write_weight(self, merged, before=weight)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Subtract what was merged; exact up to rounding, as in PEFT, which on a quantised base is coarse."""
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if adapter in self.molora_A:
                weight = read_weight(self)
                write_weight(self, weight - self.get_delta_weight(adapter).to(weight.dtype))

    def expert_factors(self, adapter: str, expert: int) -> tuple[Tensor, Tensor] | None:
        """Return A [r, I] and B [O, r] of one expert, bit for bit as in its file; None without ranks here."""
        segment = self.mixtures[adapter].rank_map.slices()[expert]
        if segment.start == segment.stop:
            return None
        A, B = self._stored_factors(adapter)
        return A.detach()[segment], B.detach()[segment].T

    def extra_repr(self) -> str:
        """Show the ranks of every adapter's experts."""
        return ", ".join(f"{adapter}: ranks={m.rank_map.ranks}" for adapter, m in self.mixtures.items())


def gives_new_memory(module: nn.Module) -> bool:
    """Whether only the caller holds the output of a linear layer, so that the output may be overwritten."""
    # A hook may keep the output. A function in place of the method `forward` may do anything with it.
    hooked = module._forward_hooks or nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]  # torch's
    return type(module) in (nn.Linear, Conv1D) and not hooked and "forward" not in module.__dict__
