"""A linear layer of the base with a gated mixture of LoRA experts on it.

The base layer is a black box: nn.Linear, GPT-2's Conv1D, and every quantised linear that gives its
sizes. Letters: N tokens, I in, O out, R total rank, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import PeftMoeError
from ...io.offload import read
from ...ops import RankMap, folded_delta, mix
from ...routers import Router
from ...routing.context import Routing, RoutingContext, current_context
from ...routing.mixed_batch import narrow, rows_of
from .cached_submodules import cache_submodules
from .feed_forward import Member, mix_in_block
from .frozen_experts import held_rows, hold, trained_part
from .linear_like import as_linear, gives_new_memory, linear_sizes, per_token
from .merging import read_weight, write_weight
from .resolve_controls import refuse_merged, refuse_passing
from .scope import Decider
from .shared_router import MixtureLayer


class MoLoraLayer(nn.Module, MixtureLayer):
    """Experts of every adapter on one linear layer.

    ``molora_A.<adapter>`` holds the experts' A factors on one rank axis [R, I], ``molora_B.<adapter>``
    their B factors [R, O]: expert-major and transposed against LoRA, so that an expert is one slab of
    each. Both are plain ``nn.Linear`` modules, the only containers that PEFT's casts, loaders and
    copies all leave alone.
    """

    adapter_layer_names = ("molora_A", "molora_B", "molora_router")
    other_param_names = ("rank_maps", "deciders", "members", "constant_routers", "backends", "held")

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
        self.rank_maps: dict[str, RankMap] = {}
        self.deciders: dict[str, Decider] = {}
        # Of mixing="block": the feed-forward network that this layer is part of.
        self.members: dict[str, Member] = {}
        self.backends: dict[str, str] = {}
        # Routers that this layer shares with others and whose gates do not depend on the input.
        self.constant_routers: dict[str, Any] = {}
        # Ranks of experts that stay as they are while others train.
        self.held: dict[str, Tensor | None] = {}
        # Adapters whose experts are promised by a loaded config and not known to have arrived yet.
        self.pending_weights: set[str] = set()
        cache_submodules(self, "molora_A", "molora_B", "molora_router")
        self._start_empty()

    def add_mixture(
        self,
        adapter: str,
        A_RI: Tensor,
        B_RO: Tensor,
        rank_map: RankMap,
        *,
        decider: Decider,
        router: Router | None,
        trains: Sequence[bool],
        member: Member | None = None,
        backend: str = "auto",
    ) -> None:
        """Put a mixture on this layer.

        Args:
            adapter: the adapter's name.
            A_RI, B_RO: the experts' factors on one rank axis, in the dtype they came in.
            rank_map: which rank belongs to which expert.
            decider: who decides.
            router: this layer's own router, for scope "module"; None where it is shared.
            trains: of each expert, whether it trains. If none does, all are declared frozen to PEFT, which
                then keeps them so; else those that do not are held still.
            member: the feed-forward network at whose output the experts are mixed; None mixes them here.
            backend: how the mixture is computed.
        """
        self.molora_A[adapter] = as_linear(A_RI)
        self.molora_B[adapter] = as_linear(B_RO)
        self.rank_maps[adapter] = rank_map
        self.deciders[adapter] = decider
        if member is not None:
            self.members[adapter] = member
        self.backends[adapter] = backend
        if router is not None:
            self.molora_router[adapter] = router
        self.set_trained(adapter, trains)

    def set_trained(self, adapter: str, trains: Sequence[bool]) -> None:
        """Say which experts train, in the mixture's order; what trains now, PEFT's switches decide."""
        frozen: tuple[str, ...] = () if any(trains) else ("molora_A", "molora_B")
        if adapter in self.molora_router and not self.molora_router[adapter].trainable:
            frozen += ("molora_router",)
        self.frozen_peft_weight_names[adapter] = frozen
        self.held[adapter] = held_rows(self.rank_maps[adapter], trains)
        for side in (self.molora_A, self.molora_B):
            hold(side[adapter].weight, self.held[adapter])

    def _home(self, adapter: str) -> nn.Module | None:
        base_layer: nn.Module = self.get_base_layer()
        return base_layer

    def follow_base_dtype(self, adapter: str) -> None:
        """Keep an adapter's experts in the base layer's dtype, if that is one to compute in."""
        weight = getattr(self.get_base_layer(), "weight", None)
        if adapter not in self.molora_A or adapter in self.pending_weights or not isinstance(weight, Tensor):
            return
        if weight.dtype in (torch.float16, torch.bfloat16):
            self.molora_A[adapter].to(weight.dtype)
            self.molora_B[adapter].to(weight.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus every active mixture's; [..., I] to [..., O]."""
        disabled, merged = self._disable_adapters, self.merged_adapters
        if disabled and merged:
            self.unmerge()  # which empties the list
        base_layer: nn.Module = self.base_layer
        result = base_layer(x, *args, **kwargs)
        context = current_context()
        if merged and not disabled:
            refuse_merged(self.name, context)
        if disabled or merged or (context is not None and context.probing):
            return result
        overwrite = gives_new_memory(base_layer)
        for adapter in self.adapters_now():
            if adapter in self.molora_A:
                result = self._mix(adapter, x, result, context, overwrite)
        return result

    def _mix(
        self, adapter: str, x: Tensor, result: Tensor, context: RoutingContext | None, overwrite: bool
    ) -> Tensor:
        if adapter in self.pending_weights:
            self._check_arrived(adapter)
        if adapter in self.members:
            return mix_in_block(self, adapter, x, result)
        rows = rows_of(adapter, x, self.name)
        router: Any = self.molora_router[adapter] if adapter in self.molora_router else None  # noqa: SIM401  # ModuleDict has no get
        routing = self.deciders[adapter].decide(adapter, self.name, x, router, context)
        if rows is None:
            return self._apply_experts(adapter, routing, x, result, context, overwrite)
        part = self._apply_experts(adapter, narrow(routing, rows, x), x[rows], result[rows], None, True)
        return result.index_copy(0, rows, part)

    def _apply_experts(
        self,
        adapter: str,
        routing: Routing,
        x: Tensor,
        result: Tensor,
        context: RoutingContext | None,
        overwrite: bool,
    ) -> Tensor:
        tokens = x.numel() // x.shape[-1]
        A, B = read(self.molora_A[adapter]), read(self.molora_B[adapter])
        base_NO = result.reshape(tokens, result.shape[-1])
        kept = None if context is None else context.wide
        wide = None if kept is None else kept.find(x)
        mixed_NO = mix(
            x.reshape(tokens, x.shape[-1]),
            *trained_part(A, B, self.held.get(adapter)),
            None if routing.expert_ids is not None else per_token(routing.gates, x, tokens),
            self.rank_maps[adapter],
            base_NO,
            expert_ids_NK=per_token(routing.expert_ids, x, tokens),
            weights_NK=per_token(routing.expert_weights, x, tokens),
            may_select_null=routing.may_select_null,
            backend=self.backends[adapter],
            overwrite=overwrite,
            fp32_NI=None if wide is None else wide.reshape(tokens, -1),
        )
        written = mixed_NO is base_NO and result.is_contiguous()
        return result if written else mixed_NO.view(result.shape)

    def _check_arrived(self, adapter: str) -> None:
        # Such experts start empty or as NaN; whoever loads them overwrites all of it, on whatever path.
        weight = read(self.molora_A[adapter])
        if weight.is_meta or bool(torch.isnan(weight.flatten()[0])):
            raise PeftMoeError(
                f"{self.name}: the config of adapter {adapter!r} describes experts whose weights were never "
                "loaded; load the folder with PeftModel.from_pretrained, or give `experts` as adapter paths"
            )
        self.pending_weights.discard(adapter)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # Awaited experts take the dtype of the file, else copying would widen or round them.
        for side in ("molora_A", "molora_B"):
            for adapter in self.pending_weights:
                stored = state_dict.get(f"{prefix}{side}.{adapter}.weight")
                if stored is not None:
                    weight = getattr(self, side)[adapter].weight
                    weight.data = weight.data.to(stored.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def constant_gates(self, adapter: str) -> Tensor:
        """Gates [E] of a router that does not read its input.

        Raises:
            PeftMoeError: the gates depend on the input, or act behind the next layer: nothing can be merged.
        """
        refuse_passing(adapter)
        if adapter in self.members:
            raise PeftMoeError(
                f"adapter {adapter!r} mixes whole feed-forward networks (mixing='block'), whose sum is no "
                "single network, so that it cannot be merged into one weight; serve it with peft_moe "
                "imported, or use mixing='linear' with router='uniform'"
            )
        shared = self.constant_routers.get(adapter)
        router = self.molora_router[adapter] if adapter in self.molora_router else shared  # noqa: SIM401  # ModuleDict has no get
        if router is None or router.reads_input:
            raise PeftMoeError(
                f"adapter {adapter!r} routes by its input, so it cannot be merged into one weight; "
                "serve it with peft_moe imported, or use router='uniform', whose gates are constant"
            )
        weight = self.molora_A[adapter].weight
        # As wide as a forward pass: the model's one decision is float32, others follow what the layer reads.
        own = torch.float32 if self.deciders[adapter].scope == "model" else weight.dtype
        wide = torch.promote_types(own, torch.float32)
        probe_11I = torch.zeros(1, 1, self.in_features, device=weight.device, dtype=wide)
        gates_E: Tensor = router(probe_11I).gates.reshape(-1)
        return gates_E

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The weight change of a mixture with constant gates, in the base weight's orientation."""
        delta_OI = folded_delta(
            self.molora_A[adapter].weight,
            self.molora_B[adapter].weight,
            self.constant_gates(adapter),
            self.rank_maps[adapter],
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
        """A [r, I] and B [O, r] of one expert as they were read, bit for bit; None if it is not here."""
        segment = self.rank_maps[adapter].slices()[expert]
        if segment.start == segment.stop:
            return None
        A, B = self.molora_A[adapter].weight, self.molora_B[adapter].weight
        return A.detach()[segment], B.detach()[segment].T

    def extra_repr(self) -> str:
        """Ranks of every adapter's experts."""
        return ", ".join(f"{adapter}: ranks={m.ranks}" for adapter, m in self.rank_maps.items())
