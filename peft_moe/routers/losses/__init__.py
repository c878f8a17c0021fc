"""Losses on routing decisions: per layer, over real tokens only, then the mean over layers.

Pooling layers before the product, as is often done, hides collapse: four layers that each use one
expert of four score a perfect 1.0 together, and 4.0 when each is judged by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...routing.context import Routing, RoutingContext, RoutingRecord
from .. import RouterSettings
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
from .weighting import decision_domains, decision_weights

__all__ = [
    "LOSSES",
    "NEED_DOMAINS",
    "LossFn",
    "active_losses",
    "auxiliary_losses",
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
    "router_z_loss",
    "sparsity_loss",
    "visible",
    "zero_share",
]

LossFn = Callable[..., Tensor]
"""``(routing, weights, context, **options) → scalar``, for one layer."""

# Config field of the weight -> loss. A new loss is one function and one line here.
LOSSES: dict[str, LossFn] = {
    "router_aux_loss_coef": load_balancing_loss,
    "router_z_loss_coef": router_z_loss,
    "router_entropy_coef": entropy_loss,
    "router_label_loss_coef": label_loss,
    "router_lbc_coef": localised_balancing_loss,
    "router_l1_coef": sparsity_loss,
}
# Those of them that are about each sample's domain.
NEED_DOMAINS = ("router_label_loss_coef", "router_lbc_coef")
# Config fields that a loss reads beside its weight.
_OPTIONS: dict[str, dict[str, str]] = {"router_lbc_coef": {"delta": "router_lbc_delta"}}


def active_losses(config: Any) -> list[str]:
    """Config fields of the losses on decisions whose weight is not zero."""
    return [name for name in LOSSES if getattr(config, name) != 0]


def loss_options(config: Any) -> dict[str, dict[str, Any]]:
    """What the losses of a config read beside their weights, by the weight's field."""
    return {
        name: {option: getattr(config, field) for option, field in fields.items()}
        for name, fields in _OPTIONS.items()
    }


def auxiliary_losses(
    record: RoutingRecord,
    names: list[str],
    *,
    settings: Mapping[str, RouterSettings] | None = None,
    options: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, Tensor]:
    """Un-weighted losses of the last forward pass, each the mean over its routers.

    Args:
        record: from :func:`peft_moe.record_routing`.
        names: keys of :data:`LOSSES`.
        settings: of the routers, by the names under which they were recorded; with them, columns that a
            layer lacks and experts that are always on do not count.
        options: from :func:`loss_options`; needed by ``router_lbc_coef``.

    Returns:
        name to scalar; empty where no router scored anything.
    """
    context = record.context
    scored = {name: r for name, r in record.decisions.items() if r.logits is not None}
    if context is None or not scored:
        return {}
    seen = [visible(routing, context, (settings or {}).get(name)) for name, routing in scored.items()]
    device = seen[0][0].gates.device  # a model may be spread over several
    return {
        name: _mean_over_layers(partial(LOSSES[name], **(options or {}).get(name, {})), seen, device)
        for name in names
    }


def _mean_over_layers(
    loss: LossFn, seen: list[tuple[Routing, RoutingContext]], device: torch.device
) -> Tensor:
    return torch.stack([loss(r, decision_weights(r, c), c).to(device) for r, c in seen]).mean()
