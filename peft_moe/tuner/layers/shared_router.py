"""Routers that several layers share.

A shared router is a PEFT layer without a base layer, so that PEFT saves, loads, freezes and deletes it like
any other layer. It is an attribute of the model or of a block. The attribute's name must not contain PEFT's
prefix ``molora_``: PEFT skips modules with the prefix when it deletes an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...routers import Router
from ...routing.context import Routing, Slot, current_request
from ...routing.mixed_batch import named_adapters
from .meta_weights import is_empty

MODEL_ROUTER = "shared_router"
BLOCK_ROUTER = "block_router"


class MixtureLayer(BaseTunerLayer):
    """The layer class that PEFT looks for: layers with experts, and shared routers."""

    name: str

    def _start_empty(self) -> None:
        # In PEFT these are class attributes, which all instances would share.
        self.merged_adapters: list[str] = []
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []

    def adapters_now(self) -> list[str]:
        """Return the adapters that the running call uses: those that its rows name, else the active ones."""
        row_adapters = current_request().row_adapters
        if row_adapters is not None:
            return named_adapters(row_adapters)
        active: list[str] = self.active_adapters
        return active

    def _home(self, adapter: str) -> nn.Module | None:
        """Return the part of the base whose device the weights of ``adapter`` follow."""
        raise NotImplementedError

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT calls this after a load. PEFT's version also casts to the base's dtype, which would round
        # experts, and needs a base layer, which shared routers do not have.
        home = self._home(adapter_name)
        if device is None and home is not None:
            tensors = chain(home.named_parameters(), home.named_buffers())
            device = next((t.device for name, t in tensors if "molora_" not in name), None)
        if device is None or device.type == "meta":
            return
        for kind in self.adapter_layer_names:
            parts = getattr(self, kind)
            if adapter_name in parts and not is_empty(parts[adapter_name]):
                parts[adapter_name].to(device)


class SharedRouter(nn.Module, MixtureLayer):
    """Routers of one block or of the whole model, one per adapter."""

    adapter_layer_names = ("molora_router",)
    other_param_names: tuple[str, ...] = ()
    # PEFT reads these of every layer.
    in_features = out_features = None

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.molora_router = nn.ModuleDict()
        self.handles: list[Any] = []
        self._start_empty()

    @property
    def weight(self) -> Tensor:
        """Refuse: PEFT's own property would search for a base layer without end."""
        raise AttributeError("a shared router has no base layer, and so no weight")

    @property
    def bias(self) -> Tensor:
        """Refuse, as for :attr:`weight`."""
        raise AttributeError("a shared router has no base layer, and so no bias")

    def detach_hooks(self) -> None:
        """Remove all hooks from the watched modules."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def add_router(self, adapter: str, router: Router) -> None:
        """Add the router of ``adapter``. One that does not train is declared frozen to PEFT."""
        self.molora_router[adapter] = router
        if not router.trainable:
            self.frozen_peft_weight_names[adapter] = ("molora_router",)

    def forward(self, x: Any) -> Any:
        """Return ``x``: an ``nn.Sequential`` that has a shared router calls it as one of its steps."""
        return x

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Do nothing: a router has no weight to merge, and the layers refuse a merge before."""

    def unmerge(self) -> None:
        """Do nothing: no router was merged."""


@dataclass
class BlockCall:
    """One call of a block: its router, and its decisions by adapter and shape of tokens."""

    block: BlockRouter
    decisions: dict[tuple[str, tuple[int, ...]], Routing] = field(default_factory=dict)
    parent: BlockCall | None = None


_block_call = Slot[BlockCall]("peft_moe_block")


class BlockRouter(SharedRouter):
    """The router of one attention or feed-forward module.

    It reads the input of the first adapted layer that the block calls; the block's other layers use the
    same decision. The decision lasts as long as the call of the block. A recomputed block decides again, and
    the next forward pass finds no old decision.
    """

    other_param_names = ("scopes",)

    def __init__(self, name: str) -> None:
        super().__init__(name)
        # For mixing="block": the scope of each adapter, the adapters with experts in the last linear, and the
        # linears that are watched.
        self.scopes: dict[str, Any] = {}
        self.with_output_experts: set[str] = set()
        self.linears: tuple[str, ...] = ()

    def _home(self, adapter: str) -> nn.Module | None:
        block: nn.Module = self.__dict__["_block"]
        return block

    def attach(self, block: nn.Module) -> None:
        """Watch the calls of ``block``, and become an attribute of it."""
        self.__dict__["_block"] = block  # no submodule: the block already holds this router
        setattr(block, BLOCK_ROUTER, self)
        self.handles.append(block.register_forward_pre_hook(self._enter))
        self.handles.append(block.register_forward_hook(self._leave, always_call=True))

    def _enter(self, block: nn.Module, args: Any) -> None:
        _block_call.set(BlockCall(self, parent=_block_call.get()))

    def _leave(self, block: nn.Module, args: Any, output: Any) -> None:
        call = _block_call.get()
        if call is not None and call.block is self:
            _block_call.set(call.parent)


def running_block() -> BlockCall | None:
    """The call of a block that is running; None outside of one."""
    return _block_call.get()


def share_constant(shared_routers: list[SharedRouter], adapter: str, layers: dict[str, Any]) -> None:
    """Hand layers the shared router whose gates do not depend on the input, so that they can merge them."""
    routers = {
        shared.name: shared.molora_router[adapter]
        for shared in shared_routers
        if adapter in shared.molora_router
    }
    for name, layer in layers.items():
        router = routers.get(name.rpartition(".")[0]) or routers.get(MODEL_ROUTER)
        layer.mixtures[adapter].constant_router = router


def named_routers(model: nn.Module, adapter: str) -> Iterator[tuple[str, Router]]:
    """Yield every router of an adapter with the name under which its decisions are recorded."""
    for module in model.modules():
        if isinstance(module, MixtureLayer):
            routers: Any = getattr(module, "molora_router", {})
            if adapter in routers:
                name = f"{MODEL_ROUTER}.{adapter}" if module.name == MODEL_ROUTER else module.name
                yield name, routers[adapter]
