"""Losses on routing decisions: computed per layer over real tokens, then averaged over layers.

Implementations often pool the layers before the product, which hides collapse: four layers that each use one
expert of four score a perfect 1.0 together, and 4.0 when each layer is judged by itself.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...routing.context import Routing, RoutingContext, RoutingRecord
from ..settings import RouterSettings
from .decisions import (
    entropy_loss,
    label_loss,
    load_balancing_loss,
    localised_balancing_loss,
    router_z_loss,
    sparsity_loss,
    zero_share,
)
from .distillation import distillation_kl
from .experts import orthogonality_loss
from .masks import present_columns, visible
from .registry import (
    LOSSES,
    Loss,
    LossFn,
    active_losses,
    check_loss_names,
    coefficient_fields,
    loss_options,
    register_loss,
)
from .weighting import decision_domains, decision_weights

__all__ = [
    "LOSSES",
    "Loss",
    "LossFn",
    "active_losses",
    "auxiliary_losses",
    "check_loss_names",
    "coefficient_fields",
    "decision_domains",
    "decision_weights",
    "distillation_kl",
    "entropy_loss",
    "label_loss",
    "load_balancing_loss",
    "localised_balancing_loss",
    "loss_options",
    "orthogonality_loss",
    "present_columns",
    "register_loss",
    "router_z_loss",
    "sparsity_loss",
    "visible",
    "zero_share",
]

# A file in this folder registers its losses when it is imported.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def auxiliary_losses(
    record: RoutingRecord,
    names: list[str],
    *,
    settings: Mapping[str, RouterSettings] | None = None,
    options: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, Tensor]:
    """Compute the unweighted losses of the last forward pass, each the mean over its routers.

    Args:
        record: from :func:`peft_moe.record_routing`.
        names: keys of :data:`LOSSES`.
        settings: the routers' settings, by the names under which their decisions are recorded. With them,
            columns that a layer lacks and experts that are always on do not count.
        options: from :func:`loss_options`; ``router_lbc_coef`` needs them.

    Returns:
        A scalar for each name; empty if no router computed scores.
    """
    context = record.context
    scored = {name: r for name, r in record.decisions.items() if r.logits is not None}
    if context is None or not scored:
        return {}
    seen = [visible(routing, context, (settings or {}).get(name)) for name, routing in scored.items()]
    device = seen[0][0].gates.device  # a model may be spread over several
    return {
        name: _mean_over_layers(partial(LOSSES[name].function, **(options or {}).get(name, {})), seen, device)
        for name in names
    }


def _mean_over_layers(
    loss: LossFn, seen: list[tuple[Routing, RoutingContext]], device: torch.device
) -> Tensor:
    return torch.stack([loss(r, decision_weights(r, c), c).to(device) for r, c in seen]).mean()
