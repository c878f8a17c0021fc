"""Groups of layers with their own number of experts and of used experts (MoLA, arXiv 2402.08562)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from ...errors import PeftMoeError
from ...ops import RankMap
from ...routers import RouterSettings
from ..config.mixture import MoLoraConfig
from .tap import find_stack


class LayerGroups:
    """The base's main stack of layers, split into groups of equal size.

    Args:
        config: of the mixture. Without ``experts_per_layer`` and ``top_k_per_layer`` there are no groups.
        model: the base.

    Raises:
        PeftMoeError: there are more groups than layers, or no stack of layers.
    """

    def __init__(self, config: MoLoraConfig, model: nn.Module) -> None:
        self.config = config
        self.stack, self.layers = "", 0
        grouped_fields = [
            name for name in ("experts_per_layer", "top_k_per_layer") if getattr(config, name) is not None
        ]
        if grouped_fields:
            self.stack, layers = find_stack(model)
            self.layers = len(layers)
        for name in grouped_fields:
            groups = len(getattr(config, name))
            if groups > self.layers:
                raise PeftMoeError(
                    f"{name}={getattr(config, name)} has {groups} groups for the {self.layers} layers of "
                    f"{self.stack}; give at most one per layer"
                )

    def _of(self, values: Sequence[int] | None, module_name: str) -> int | None:
        if values is None or not module_name.startswith(self.stack + "."):
            return None
        index = int(module_name[len(self.stack) + 1 :].split(".", 1)[0])
        return values[index * len(values) // self.layers]

    def settings(self, module_name: str) -> RouterSettings:
        """Return the settings of the router at ``module_name``."""
        present = self._of(self.config.experts_per_layer, module_name)
        return layer_settings(self.config, present, self._of(self.config.top_k_per_layer, module_name))

    def cut(self, ranks: RankMap, module_name: str) -> RankMap:
        """Return the ranks without those of experts that the layer does not have."""
        present = self._of(self.config.experts_per_layer, module_name)
        if present is None:
            return ranks
        own_ranks = tuple(rank if expert < present else 0 for expert, rank in enumerate(ranks.ranks))
        return RankMap(own_ranks, ranks.scaling)


def layer_settings(config: MoLoraConfig, present: int | None, top_k: int | None) -> RouterSettings:
    """Return the settings of the router of one layer.

    Args:
        config: the mixture's.
        present: number of experts in the layer; None for all.
        top_k: of the layer, where it has its own.
    """
    settings = config.router_settings(present=present, top_k=top_k)
    columns = settings.num_columns - len(settings.missing_columns)
    # A layer with fewer experts than top_k uses all that it has.
    if settings.top_k is not None and settings.top_k > columns:
        return replace(settings, top_k=columns)
    return settings
