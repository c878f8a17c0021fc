"""One mixture of a model as an edit sees it: what it holds, and what can be refused before it is touched."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from ..errors import PeftMoeError
from ..experts.adapter import ExpertFile
from ..experts.spec import ExpertSpec
from ..routers import Router
from ..tuner.config.mixture import MoLoraConfig
from ..tuner.layers.linear import MoLoraLayer
from ..tuner.layers.model_router import ModelRouter
from ..tuner.layers.shared_router import MODEL_ROUTER, named_routers
from ..tuner.layers.tap import resolve_tap
from ..tuner.model import MoLoraModel
from ..tuner.saving.expert_digests import expert_digests
from .plan import Edit, edited_config, ranks_after

Move = Callable[[Tensor], Tensor]


@dataclass
class Edited:
    """What an edit did.

    Attributes:
        adapter: the mixture's name.
        experts: its experts now, in order.
        injected, dropped: modules of the base that it adapts since, and no longer.
    """

    adapter: str
    experts: list[str]
    injected: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    # Parameters that were replaced, by what, and how anything of the old shape moves to the new one.
    changes: list[tuple[nn.Parameter, nn.Parameter | None, Move]] = field(default_factory=list, repr=False)


class LiveMixture:
    """One mixture of a PeftModel, as an edit sees it.

    Args:
        model: the PeftModel.
        adapter_name: which mixture; None for the active one.

    Raises:
        PeftMoeError: it has none, or its experts are merged or have not arrived.
    """

    def __init__(self, model: nn.Module, adapter_name: str | None) -> None:
        self.adapter, self.config = _find(model, adapter_name)
        self.tuner: MoLoraModel = model.base_model  # type: ignore[assignment]
        self.inner: nn.Module = self.tuner.model
        self.seat: ModelRouter = getattr(self.inner, MODEL_ROUTER)
        if self.config.mixing == "block":
            raise PeftMoeError(
                "a mixture with mixing='block' is not edited in memory; save it, edit the folder (peft-moe "
                "edit), and load it again"
            )
        self.order = {name: number for number, (name, _) in enumerate(self.inner.named_modules())}
        for layer in self.layers.values():
            if layer.merged:
                raise PeftMoeError(
                    "experts that are merged into the base cannot be edited; unmerge_adapter()"
                )
            if layer.mixtures[self.adapter].pending_weights:
                layer._check_arrived(self.adapter)

    @property
    def layers(self) -> dict[str, MoLoraLayer]:
        """Adapted layers by name, in the model's order."""
        return {
            module.name: module
            for module in self.inner.modules()
            if isinstance(module, MoLoraLayer) and self.adapter in module.molora_A
        }

    @property
    def router(self) -> Router:
        """Any of its routers: all have one kind."""
        return next(router for _, router in named_routers(self.inner, self.adapter))

    def write_digests(self) -> None:
        """Record what the experts that do not train are now; the others have nothing to be held against."""
        found = expert_digests(self.inner, self.adapter)
        for record, trains, digest in zip(self.config.records(), self.config.trains, found, strict=True):
            record.pop("digest", None)
            if digest is not None and not trains:
                record["digest"] = digest

    def plan(self, edit: Edit, file: ExpertFile | None) -> tuple[Edit, MoLoraConfig, list[str]]:
        """Everything that can be refused, before anything is touched.

        Returns:
            The edit, with experts pinned to the modules that they are in; the config; modules to adapt.
        """
        layers, found = self.layers, list(file.modules) if file is not None else []
        wanted = [name for name in found if name not in layers and self._above_tap(name)]
        matched = {name for name in found if check_target_module_exists(self.config, name)}
        targets: set[str] | None = None
        if set(wanted) - matched:
            own = self.config.target_modules
            targets = {*(layers if isinstance(own, str) or own is None else own), *(set(wanted) - matched)}
        config = edited_config(self.config, edit, targets=targets)
        left_out = [name for name in wanted if not check_target_module_exists(config, name)]
        if left_out:
            self._say_left_out(edit, left_out, found)
        wanted = [name for name in wanted if name not in left_out]
        edit = Edit(edit.old, tuple(self._pinned(edit, wanted)), edit.rows)
        config = edited_config(self.config, edit, targets=targets)
        kept = [
            n
            for n, layer in layers.items()
            if ranks_after(edit, layer.mixtures[self.adapter].rank_map, n).total
        ]
        if not kept and not wanted:
            raise PeftMoeError(f"{edit.names} adapt no module that this mixture could hold")
        if config.router_scope == "block":
            self._check_blocks(list(layers), [*kept, *wanted])
        return edit, config, wanted

    def _above_tap(self, name: str) -> bool:
        tap, stack = resolve_tap(self.config, self.inner)
        return tap is None or tap.below != "base" or tap.lies_above(stack, name)

    def _say_left_out(self, edit: Edit, left_out: list[str], found: list[str]) -> None:
        name = edit.names[edit.new[0]]
        if len(left_out) == len(found):
            raise PeftMoeError(
                f"expert {name!r}: exclude_modules={self.config.exclude_modules} leaves out all that it "
                f"adapts, such as {left_out[0]}; make a mixture without it"
            )
        warnings.warn(
            f"expert {name!r} also adapts {len(left_out)} modules that exclude_modules leaves out, such as "
            f"{left_out[0]}; its output will differ from the adapter's own",
            stacklevel=4,
        )

    def _pinned(self, edit: Edit, wanted: list[str]) -> list[ExpertSpec]:
        """Descriptions that stay true when modules are adapted in which an expert has no ranks."""
        specs = []
        for old, spec in zip(edit.old, edit.specs, strict=True):
            if old is None or not any(spec.rank_in(name) for name in wanted):
                specs.append(spec)
                continue
            here = [n for n, layer in self.layers.items() if layer.mixtures[self.adapter].rank_map.ranks[old]]
            elsewhere = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
            specs.append(replace(spec, target_modules=sorted(here), **elsewhere))  # type: ignore[arg-type]
        return specs

    def _check_blocks(self, before: list[str], after: list[str]) -> None:
        def firsts(names: list[str]) -> dict[str, str]:
            found: dict[str, str] = {}
            for name in sorted(names, key=self.order.__getitem__):
                found.setdefault(name.rpartition(".")[0], name)
            return found

        now = firsts(after)
        for block, first in firsts(before).items():
            if now.get(block, first) != first:
                raise PeftMoeError(
                    f"router_scope='block': the router of {block} reads the input of {first}, its first "
                    f"adapted layer; that would then be {now[block]}, which may see something else. Make a "
                    "new mixture, or use router_scope='module' or 'model'"
                )


def _find(model: nn.Module, adapter_name: str | None) -> tuple[str, MoLoraConfig]:
    configs: dict[str, Any] = model.peft_config if isinstance(model, PeftModel) else {}
    names = [adapter_name] if adapter_name is not None else model.active_adapters if configs else []
    for name in names:  # type: ignore[union-attr]
        if isinstance(configs.get(name), MoLoraConfig):
            return name, configs[name]
    raise PeftMoeError(
        f"{type(model).__name__} carries no mixture named {names}; its adapters are {sorted(configs)}. Pass "
        "the PeftModel, and adapter_name where the mixture is not the active one"
    )
