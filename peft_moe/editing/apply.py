"""An edit carried out on a model in memory: slabs and rows move, layers come and go.

Letters: I in, O out, R total rank.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..experts.adapter import ExpertFile
from ..routers import Router
from ..tuner.config.mixture import MoLoraConfig
from ..tuner.layers.expert_factors import ExpertPlan, as_linear
from ..tuner.layers.layer_groups import LayerGroups
from ..tuner.layers.linear import MoLoraLayer
from ..tuner.layers.meta_weights import real_weights
from ..tuner.layers.shared_router import BLOCK_ROUTER, MODEL_ROUTER, SharedRouter, share_constant
from ..tuner.layers.tap import resolve_tap
from ..tuner.model import add_block_routers
from .mixture import Edited, LiveMixture
from .plan import Edit, moved_factor, ranks_after
from .router_columns import Columns, column_axes, start_columns


class Editor(LiveMixture):
    """Carries edits out on the mixture that it was made for."""

    def carry_out(
        self, edit: Edit, config: MoLoraConfig, wanted: list[str], file: ExpertFile | None, init: str
    ) -> Edited:
        """Do what :meth:`plan` found possible."""
        done = Edited(self.adapter, edit.names)
        moves = edit.moves(self.config.num_experts)
        self.config.__dict__.update(config.__dict__)
        if not moves:
            return done
        depth = LayerGroups(self.config, self.inner)
        for name, layer in self.layers.items():
            after = ranks_after(edit, layer.mixtures[self.adapter].rank_map, name)
            if after.total == 0:
                self._drop(layer, done)
                continue
            new = file.read(name) if file is not None and any(after.ranks[p] for p in edit.new) else None
            ranks = layer.mixtures[self.adapter].rank_map.ranks, after.ranks
            for side, slab in ((layer.molora_A, new and new[0]), (layer.molora_B, new and new[1].T)):
                self._move_factor(side, layer, edit, slab, done)
            layer.mixtures[self.adapter].rank_map = after
            if self.adapter in layer.molora_router:
                A_RI: Any = layer.molora_A[self.adapter].weight
                B_RO: Any = layer.molora_B[self.adapter].weight
                experts = A_RI, B_RO, after.scaling
                self._move_router(layer, depth.settings(name), edit, init, done, ranks, experts)
            layer.set_trained(self.adapter, self.config.trains)
        self._move_shared(edit, depth, init, done)
        if wanted:
            self._inject(wanted, edit, file, init, depth, done)
        if self.config.router_scope != "module" and not self.config.scorer.reads_input:
            seats = [m for m in self.inner.modules() if isinstance(m, SharedRouter)]
            share_constant(seats, self.adapter, self.layers)
        self.write_digests()
        return done

    def _move_factor(
        self, side: nn.ModuleDict, layer: MoLoraLayer, edit: Edit, new: Tensor | None, done: Edited
    ) -> None:
        before: Any = side[self.adapter].weight
        ranks = layer.mixtures[self.adapter].rank_map
        with torch.no_grad():
            moved = moved_factor(before.detach(), ranks, edit, new).contiguous()
        linear = as_linear(moved).train(layer.training)
        linear.weight.requires_grad_(before.requires_grad)
        width = [len(new)] if new is not None else [0]

        def move(value: Tensor) -> Tensor:
            empty = value.new_zeros(width[0], value.shape[1])
            return moved_factor(value, ranks, edit, empty if edit.new else None)

        side[self.adapter] = linear
        after: Any = linear.weight
        done.changes.append((before, after, move))

    def _move_router(
        self,
        seat: Any,
        settings: Any,
        edit: Edit,
        init: str,
        done: Edited,
        ranks: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
        experts: tuple[Tensor, Tensor, tuple[float, ...]] | None = None,
    ) -> None:
        old: Router = seat.molora_router[self.adapter]
        axes = column_axes(old.settings, self.config.router)
        columns = Columns(edit, old.settings, settings, axes, *(ranks or (None, None)))
        with _steady(seat.name), real_weights():
            new = Router(settings, old.in_features)
            if ranks is not None:
                new.scorer.expect_experts(ranks[1])
        if new.scorer.reads_experts and experts is not None and ranks is not None and columns.new_columns:
            new.scorer.read_experts(experts[0], experts[1], ranks[1], experts[2])
        fresh = new.state_dict() if new.scorer.reads_experts else {}
        kept = {name: v for name, v in old.state_dict().items() if name in new.state_dict()}
        new.load_state_dict({name: columns.carry(name, v, fresh.get(name)) for name, v in kept.items()})
        new.to(next((v.device for v in old.state_dict().values()), torch.device("cpu"))).train(old.training)
        start_columns(new, columns.new_columns, init)
        seat.molora_router[self.adapter] = new
        after = dict(new.named_parameters())
        for name, parameter in old.named_parameters():
            after[name].requires_grad_(parameter.requires_grad)
            done.changes.append((parameter, after[name], lambda v, name=name: columns.carry(name, v)))  # type: ignore[misc]

    def _move_shared(self, edit: Edit, depth: LayerGroups, init: str, done: Edited) -> None:
        here = {name.rpartition(".")[0] for name in self.layers}
        for module in list(self.inner.modules()):
            if not isinstance(module, SharedRouter) or self.adapter not in module.molora_router:
                continue
            if module.name == MODEL_ROUTER:
                self._move_router(module, self.config.router_settings(), edit, init, done)
            elif module.name in here:
                first = next(n for n in self.layers if n.rpartition(".")[0] == module.name)
                self._move_router(module, depth.settings(first), edit, init, done)
            else:
                done.changes += [
                    (p, None, Tensor.clone) for p in module.molora_router[self.adapter].parameters()
                ]
                _forget(module, self.adapter)
                if not module.molora_router:
                    module.detach_hooks()
                    delattr(self.inner.get_submodule(module.name), BLOCK_ROUTER)

    def _drop(self, layer: MoLoraLayer, done: Edited) -> None:
        done.dropped.append(layer.name)
        for part in (layer.molora_A, layer.molora_B, layer.molora_router):
            if self.adapter in part:
                done.changes += [(p, None, Tensor.clone) for p in part[self.adapter].parameters()]
        _forget(layer, self.adapter)
        if not layer.molora_A:
            parent, _, child = layer.name.rpartition(".")
            setattr(self.inner.get_submodule(parent), child, layer.base_layer)

    def _inject(
        self,
        wanted: list[str],
        edit: Edit,
        file: ExpertFile | None,
        init: str,
        depth: LayerGroups,
        done: Edited,
    ) -> None:
        assert file is not None
        tap, stack = resolve_tap(self.config, self.inner)
        plan = ExpertPlan(list(edit.specs), files=[file])
        dtype: Any = next(iter(self.layers.values())).molora_A[self.adapter].weight.dtype
        self.tuner.__dict__["_injection"] = (plan, tap, stack, depth, {})
        try:
            for name in wanted:
                parent, _, child = name.rpartition(".")
                target, above = self.inner.get_submodule(name), self.inner.get_submodule(parent)
                with _steady(name), real_weights():
                    self.tuner._create_and_replace(self.config, self.adapter, target, child, above, name)
        finally:
            self.tuner.__dict__.pop("_injection", None)
        layers = {name: layer for name, layer in self.layers.items() if name in wanted}
        seats: list[Any] = list(layers.values())
        if self.config.router_scope == "block":
            blocks = {n: m for n, m in layers.items() if not self._has_seat(n.rpartition(".")[0])}
            with _steady("blocks"), real_weights():
                seats += add_block_routers(self.inner, self.adapter, depth, blocks)
        for seat in seats:
            if self.adapter in seat.molora_router:
                router = seat.molora_router[self.adapter]
                places = [c for c, p in enumerate(router.settings.routed) if edit.row_places[p] is None]
                start_columns(router, places, init)
            if self.config.experts_train and isinstance(seat, MoLoraLayer):
                seat.molora_A[self.adapter].to(dtype)
                seat.molora_B[self.adapter].to(dtype)
            seat._move_adapter_to_device_of_base_layer(self.adapter)
            seat.enable_adapters(not self.seat.disable_adapters)
            seat.set_adapter(self.tuner.active_adapters, inference_mode=self.config.inference_mode)
        done.injected = list(layers)

    def _has_seat(self, block: str) -> bool:
        seat = getattr(self.inner.get_submodule(block), BLOCK_ROUTER, None)
        return seat is not None and self.adapter in seat.molora_router


def _forget(seat: Any, adapter: str) -> None:
    """What PEFT does when it deletes an adapter, for one layer: others keep theirs."""
    for kind in (*seat.adapter_layer_names, *seat.other_param_names):
        parts = getattr(seat, kind)
        if adapter in parts:
            del parts[adapter]
    seat.frozen_peft_weight_names.pop(adapter, None)


@contextmanager
def _steady(name: str) -> Iterator[None]:
    """Random numbers that depend on the place alone, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        yield
