"""``MoLoraModel``: injects mixtures into a base, as a PEFT tuner."""

from __future__ import annotations

import re
from typing import Any

from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from ..errors import PeftMoeError
from ..routers import Router
from .base_checks import keep_unpacked, refuse_unfit_backend
from .config.mixture import MoLoraConfig
from .layers.controlled_model import Controlled
from .layers.expert_factors import plan_experts
from .layers.feed_forward import add_feed_forward_routers, find_blocks, place_in
from .layers.find_feed_forward import FeedForward
from .layers.forward_pass import ForwardPass, UserCalls
from .layers.layer_groups import LayerGroups
from .layers.linear import LayerMixture, MoLoraLayer
from .layers.merging import requantised
from .layers.meta_weights import real_weights
from .layers.model_router import ModelRouter
from .layers.scope import RoutingScope
from .layers.shared_router import (
    BLOCK_ROUTER,
    MODEL_ROUTER,
    BlockRouter,
    MixtureLayer,
    SharedRouter,
    share_constant,
)
from .layers.tap import Tap, resolve_tap
from .saving.base_identity import record_base, record_base_precision
from .saving.load_checks import check_load, record_expert_digests
from .saving.snapshot import Snapshot


class MoLoraModel(Controlled, UserCalls, BaseTuner):
    """A base model with gated mixtures of LoRA experts in its linear layers.

    Made by ``peft.get_peft_model(model, MoLoraConfig(…))``; see :class:`MoLoraConfig`.
    """

    prefix = "molora_"
    tuner_layer_cls = MixtureLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]  # PEFT's own value

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """PEFT's injection. The experts are checked before it, shared routers are added after it.

        Raises:
            PeftMoeError: the config, an adapter or a name cannot work. The model is unchanged.
        """
        config: MoLoraConfig = self.peft_config[adapter_name]
        original = config
        if not config.inference_mode or config.sources():
            # The caller's config stays as it was, for use on another model. A config that describes a saved
            # mixture is used itself, as PEFT promises.
            self.peft_config[adapter_name] = config = original.own_copy()
        _check_adapter_name(adapter_name, model)
        before = Snapshot(model)
        record_base(config, model)
        keep_unpacked(model, trains=not config.inference_mode)
        record_base_precision(config, model)
        tap, stack = resolve_tap(config, model)
        groups = LayerGroups(config, model)
        refuse_unfit_backend(config, model)
        plan = plan_experts(config, model)
        blocks = find_blocks(config, model, plan)
        if tap is not None:
            tap.refuse_towers(model, config)
        # A loader fills all experts but those that were just read from adapters.
        empty = low_cpu_mem_usage and not plan.files
        # PEFT calls _create_and_replace with fixed arguments. The others pass through this attribute.
        self.__dict__["_injection"] = (plan, tap, stack, groups, blocks)
        with init_empty_weights() if empty else real_weights():
            try:
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, empty, state_dict)
            finally:
                self.__dict__.pop("_injection", None)
                plan.close()
            self._add_shared_routers(model, adapter_name, config, tap, groups, blocks)
        record_expert_digests(model, getattr(model, MODEL_ROUTER), adapter_name, config, plan, before)
        config.follow_head_of(original)

    def _create_and_replace(  # type: ignore[override]  # the config is always ours
        self,
        peft_config: MoLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        plan, tap, stack, groups, blocks = self.__dict__["_injection"]
        rank_map = groups.cut(plan.rank_map(current_key), current_key)
        below = tap is not None and not tap.lies_above(stack, current_key)
        if rank_map.total == 0 or (below and tap.below == "base"):
            return
        layer = target if isinstance(target, MoLoraLayer) else MoLoraLayer(target, current_key)
        A_RI, B_RO = plan.factors(current_key, rank_map, layer.in_features, layer.out_features)
        scope = RoutingScope(
            adapter_name,
            current_key,
            peft_config,
            str(peft_config.router_scope),
            below and peft_config.router_below_tap == "prompt",
        )
        mixture = LayerMixture(
            rank_map, scope, peft_config.backend, place_in(blocks, current_key, adapter_name)
        )
        has_router = scope.scope == "module" and mixture.ffn is None
        router = Router(groups.settings(current_key), layer.in_features) if has_router else None
        if router is not None:
            router.scorer.expect_experts(rank_map.ranks)
        layer.add_mixture(mixture, A_RI, B_RO, router=router, trains=peft_config.trains)
        if plan.pending_weights or layer.molora_A[adapter_name].weight.is_meta:
            mixture.pending_weights = True
        elif router is not None:
            router.scorer.read_experts(A_RI, B_RO, rank_map.ranks, rank_map.scaling)
        # Only the device follows the base layer: experts keep their dtype, routers are float32.
        layer._move_adapter_to_device_of_base_layer(adapter_name)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            setattr(parent, target_name, layer)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT's version moves weights, which fails for empty ones on int8. Ours are on their device already.
        setattr(parent, child_name, new_module)

    def _add_shared_routers(
        self,
        model: nn.Module,
        adapter: str,
        config: MoLoraConfig,
        tap: Tap | None,
        groups: LayerGroups,
        blocks: dict[str, FeedForward],
    ) -> None:
        # Only after the injection: PEFT would take an earlier router for another adapter, and leave the base
        # trainable.
        model_router: ModelRouter | None = getattr(model, MODEL_ROUTER, None)
        if model_router is None:
            model_router = ModelRouter()
            ForwardPass(model, model_router)  # its hooks hold it
            setattr(model, MODEL_ROUTER, model_router)
        model_router.mixtures[adapter] = config
        shared_routers: list[SharedRouter] = [model_router]
        layers = {
            n: m for n, m in model.named_modules() if isinstance(m, MoLoraLayer) and adapter in m.mixtures
        }
        if tap is not None:
            width = _hidden_size(model, layers)
            model_router.add_model_router(adapter, Router(config.router_settings(), width), tap)
        shared_routers += add_feed_forward_routers(model, adapter, groups, layers, blocks)
        if config.router_scope == "block":
            per_linear = {n: layer for n, layer in layers.items() if layer.mixtures[adapter].ffn is None}
            shared_routers += add_block_routers(model, adapter, groups, per_linear)
        if config.router_scope != "module" and not config.scorer.reads_input:
            share_constant(shared_routers, adapter, layers)
        for shared in shared_routers:
            shared._move_adapter_to_device_of_base_layer(adapter)
            shared.enable_adapters(not self._any_disabled(layers))
            shared.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _any_disabled(self, layers: dict[str, MoLoraLayer]) -> bool:
        return any(layer.disable_adapters for layer in layers.values())

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Frozen experts keep the dtype of their files, so that each can be taken out bit for bit.
        if self.peft_config[adapter_name].experts_train:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
            for module in () if autocast_adapter_dtype else self.model.modules():
                if isinstance(module, MoLoraLayer):
                    module.follow_base_dtype(adapter_name)
        check_load(self.model, adapter_name, self.peft_config)  # PEFT's last call of a load

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # A router has modules below the module that is named after the adapter.
        pattern = rf"(\.{cls.prefix}[^.]*)\.{re.escape(adapter_name)}(?=\.|$)"
        return re.sub(pattern, r"\1", key)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """PEFT's merge, for mixtures whose gates do not depend on the input."""
        with requantised(self._constant_layers(adapter_names), self.model):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(  # type: ignore[override]  # PEFT's returns the model, and is typed None
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        layers = self._constant_layers(adapter_names) if merge else []
        with requantised(layers, self.model):
            model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for module in list(model.modules()):
            for attribute in (MODEL_ROUTER, BLOCK_ROUTER):
                if isinstance(getattr(module, attribute, None), SharedRouter):
                    getattr(module, attribute).detach_hooks()
                    delattr(module, attribute)
        return model

    def _constant_layers(self, adapter_names: list[str] | None) -> list[MoLoraLayer]:
        """Return the layers of these adapters; raise if gates of one depend on the input."""
        names = self.active_adapters if adapter_names is None else adapter_names
        layers = [m for m in self.model.modules() if isinstance(m, MoLoraLayer)]
        adapted = [layer for layer in layers if any(name in layer.mixtures for name in names)]
        for layer in adapted:
            for name in names:
                if name in layer.mixtures:
                    layer.constant_gates(name)
        return adapted


def _check_adapter_name(adapter: str, model: nn.Module) -> None:
    # PEFT saves and copies adapters by their name between dots. It silently leaves tensors out of the file if
    # the name is also a part of a module's path.
    parts = {
        p for name, m in model.named_modules() if not isinstance(m, BaseTunerLayer) for p in name.split(".")
    }
    inside = {
        a for m in model.modules() if isinstance(m, BaseTunerLayer) for a in m._get_available_adapters()
    }
    if adapter in parts - inside or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", adapter):
        raise PeftMoeError(
            f"adapter_name={adapter!r} is part of the base's module names or no plain name, so that PEFT "
            "could not save it; choose another of letters, digits, '_' and '-'"
        )


def add_block_routers(
    model: nn.Module, adapter: str, groups: LayerGroups, layers: dict[str, MoLoraLayer]
) -> list[SharedRouter]:
    """Give each block of these layers a router, which reads the input of the first of them."""
    block_routers: dict[str, SharedRouter] = {}
    for name, layer in layers.items():
        block_name = name.rpartition(".")[0]
        if block_name in block_routers:
            continue
        block = model.get_submodule(block_name)
        block_router: BlockRouter | None = getattr(block, BLOCK_ROUTER, None)
        if block_router is None:
            block_router = BlockRouter(block_name)
            block_router.attach(block)
        block_router.add_router(adapter, Router(groups.settings(name), layer.in_features))
        block_routers[block_name] = block_router
    return list(block_routers.values())


def _hidden_size(model: nn.Module, layers: dict[str, MoLoraLayer]) -> int:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    size = getattr(config, "hidden_size", None)
    return int(size) if size is not None else next(iter(layers.values())).in_features
