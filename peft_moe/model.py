"""``MoLoraModel``: injects mixtures into a base, as a PEFT tuner."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from .backend_check import refuse_unfit_backend
from .base_fingerprint import note_base
from .base_precision import note_precision
from .block_mixing import find_blocks, member_of, seat_feed_forwards
from .call import given_shape
from .config import MoLoraConfig
from .controlled import Controlled
from .deciding import Decider
from .depth import Depth
from .empty_weights import real_weights
from .errors import PeftMoeError
from .experts.plan import plan_experts
from .feed_forward import FeedForward
from .four_bit import keep_unpacked
from .integrity import check_load, note_experts
from .layer import MoLoraLayer
from .losses import active_losses
from .mixed_batch import mixed_batch
from .model_router import ModelRouter
from .requantise import requantised
from .rollback import Snapshot
from .routers import Router
from .sharing import BLOCK_SEAT, MODEL_SEAT, BlockRouter, MixtureLayer, SharedRouter, share_constant
from .taps import Tap, resolve_tap


class MoLoraModel(Controlled, BaseTuner):
    """A base model with gated mixtures of LoRA experts in its linear layers.

    Made by ``peft.get_peft_model(model, MoLoraConfig(…))``; see :class:`MoLoraConfig`.
    """

    prefix = "molora_"
    tuner_layer_cls = MixtureLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """PEFT's injection, with the experts checked before it and shared routers seated after it.

        Raises:
            PeftMoeError: a config, an adapter or a name that cannot work; the model is untouched.
        """
        config: MoLoraConfig = self.peft_config[adapter_name]
        handed = config
        if not config.inference_mode or config.sources():
            # Whoever makes experts keeps the config as it was, and can use it again on another model; whoever
            # loads some finds the very one that was handed over, as PEFT promises.
            self.peft_config[adapter_name] = config = handed.own_copy()
        _check_adapter_name(adapter_name, model)
        before = Snapshot(model)
        note_base(config, model)
        keep_unpacked(model, trains=not config.inference_mode)
        note_precision(config, model)
        tap, stack = resolve_tap(config, model)
        depth = Depth(config, model)
        refuse_unfit_backend(config, model)
        plan = plan_experts(config, model)
        blocks = find_blocks(config, model, plan)
        if tap is not None:
            tap.refuse_towers(model, config)
        # Experts that were just read are real already; a loader fills all others.
        empty = low_cpu_mem_usage and not plan.files
        # Plain attributes for _create_and_replace, which PEFT calls with no room for more.
        self.__dict__["_injection"] = (plan, tap, stack, depth, blocks)
        with init_empty_weights() if empty else real_weights():
            try:
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, empty, state_dict)
            finally:
                self.__dict__.pop("_injection", None)
                plan.close()
            self._seat_routers(model, adapter_name, config, tap, depth, blocks)
        note_experts(model, getattr(model, MODEL_SEAT), adapter_name, config, plan, before)
        config.follow_head_of(handed)

    def _create_and_replace(
        self,
        peft_config: MoLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        plan, tap, stack, depth, blocks = self.__dict__["_injection"]
        rank_map = depth.cut(plan.rank_map(current_key), current_key)
        below = tap is not None and not tap.lies_above(stack, current_key)
        if rank_map.total == 0 or (below and tap.below == "base"):
            return
        layer = target if isinstance(target, MoLoraLayer) else MoLoraLayer(target, current_key)
        A_RI, B_RO = plan.factors(current_key, rank_map, layer.in_features, layer.out_features)
        decider = Decider(
            peft_config, str(peft_config.router_scope), below and peft_config.router_below_tap == "prompt"
        )
        member = member_of(blocks, current_key)
        own = decider.scope == "module" and member is None
        router = Router(depth.settings(current_key), layer.in_features) if own else None
        if router is not None:
            router.scorer.expect_experts(rank_map.ranks)
        layer.add_mixture(
            adapter_name,
            A_RI,
            B_RO,
            rank_map,
            decider=decider,
            router=router,
            trains=peft_config.trains,
            member=member,
            backend=peft_config.backend,
        )
        if plan.awaited or layer.molora_A[adapter_name].weight.is_meta:
            layer.awaited.add(adapter_name)
        elif router is not None:
            router.scorer.read_experts(A_RI, B_RO, rank_map.ranks, rank_map.scaling)
        # To the base layer's device, never to its dtype: experts keep theirs, routers float32.
        layer._move_adapter_to_device_of_base_layer(adapter_name)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            setattr(parent, target_name, layer)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT's version moves weights around, which breaks on empty ones over int8; ours are placed already.
        setattr(parent, child_name, new_module)

    def _seat_routers(
        self,
        model: nn.Module,
        adapter: str,
        config: MoLoraConfig,
        tap: Tap | None,
        depth: Depth,
        blocks: dict[str, FeedForward],
    ) -> None:
        # Only now: a seat that exists before the first injection makes PEFT leave the base trainable.
        seat = getattr(model, MODEL_SEAT, None)
        if seat is None:
            seat = ModelRouter(model)
            setattr(model, MODEL_SEAT, seat)
        seat.mixtures[adapter] = config
        further = ("expert_orthogonality_coef", "distillation_coef", "router_bias_update_rate")
        wanted = [*active_losses(config), *(name for name in further if getattr(config, name))]
        if wanted:
            seat.loss_fields[adapter] = wanted[-1]
        seats: list[SharedRouter] = [seat]
        layers = {
            n: m for n, m in model.named_modules() if isinstance(m, MoLoraLayer) and adapter in m.molora_A
        }
        if tap is not None:
            width = _hidden_size(model, layers)
            seat.add_model_router(adapter, Router(config.router_settings(), width), tap)
        seats += seat_feed_forwards(model, adapter, depth, layers, blocks)
        if config.router_scope == "block":
            others = {name: layer for name, layer in layers.items() if adapter not in layer.members}
            seats += seat_blocks(model, adapter, depth, others)
        if config.router_granularity != "token" or config.router_below_tap == "prompt":
            seat.per_prompt.add(adapter)
        if config.router_granularity == "running":
            seat.running.add(adapter)
        if config.router_scope != "module" and not config.scorer.reads_input:
            share_constant(seats, adapter, layers)
        for shared in seats:
            shared._move_adapter_to_device_of_base_layer(adapter)
            shared.enable_adapters(not self._any_disabled(layers))
            shared.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _any_disabled(self, layers: dict[str, MoLoraLayer]) -> bool:
        return any(layer.disable_adapters for layer in layers.values())

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Frozen experts keep the dtype they came in, so that each can be taken out bit for bit.
        if self.peft_config[adapter_name].experts_train:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
            for module in () if autocast_adapter_dtype else self.model.modules():
                if isinstance(module, MoLoraLayer):
                    module.follow_base_dtype(adapter_name)
        check_load(self.model, adapter_name, self.peft_config)  # PEFT's last call of a load

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # A router has modules below the one that is named after the adapter.
        pattern = rf"(\.{cls.prefix}[^.]*)\.{re.escape(adapter_name)}(?=\.|$)"
        return re.sub(pattern, r"\1", key)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        # PEFT enters this around one forward pass or one whole generation. A decision per prompt holds for
        # all of it, also where no KV cache carries it along.
        seat: ModelRouter = getattr(self.model, MODEL_SEAT)
        outer = seat.pinned, seat.given
        seat.pinned, seat.given = {}, given_shape(args, kwargs)
        try:
            with (
                nullcontext() if names is None else mixed_batch(self.model, names, (*args, *kwargs.values()))
            ):
                yield
        finally:
            seat.pinned, seat.given = outer

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """PEFT's merge, for mixtures whose gates do not depend on the input."""
        with requantised(self._constant_layers(adapter_names), self.model):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
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
            for seat in (MODEL_SEAT, BLOCK_SEAT):
                if isinstance(getattr(module, seat, None), SharedRouter):
                    getattr(module, seat).detach_hooks()
                    delattr(module, seat)
        return model

    def _constant_layers(self, adapter_names: list[str] | None) -> list[MoLoraLayer]:
        """Layers of these adapters, refused where the gates of one depend on the input."""
        names = self.active_adapters if adapter_names is None else adapter_names
        layers = [m for m in self.model.modules() if isinstance(m, MoLoraLayer)]
        found = [layer for layer in layers if any(name in layer.molora_A for name in names)]
        for layer in found:
            for name in names:
                if name in layer.molora_A:
                    layer.constant_gates(name)
        return found


def _check_adapter_name(adapter: str, model: nn.Module) -> None:
    # PEFT saves and copies adapters by their name between dots; a name that is also a part of a module's
    # path silently leaves tensors out of the file.
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


def seat_blocks(
    model: nn.Module, adapter: str, depth: Depth, layers: dict[str, MoLoraLayer]
) -> list[SharedRouter]:
    """Give each block of these layers a router, which reads what the first of them reads."""
    seats: dict[str, SharedRouter] = {}
    for name, layer in layers.items():
        block_name = name.rpartition(".")[0]
        if block_name in seats:
            continue
        block = model.get_submodule(block_name)
        seat = getattr(block, BLOCK_SEAT, None)
        if seat is None:
            seat = BlockRouter(block_name)
            seat.attach(block)
        seat.add_router(adapter, Router(depth.settings(name), layer.in_features))
        seats[block_name] = seat
    return list(seats.values())


def _hidden_size(model: nn.Module, layers: dict[str, MoLoraLayer]) -> int:
    config = getattr(model, "config", None)
    size = getattr(
        config.get_text_config() if hasattr(config, "get_text_config") else config,
        "hidden_size",
        None,
    )
    return int(size) if size is not None else next(iter(layers.values())).in_features
