"""The terms that a mixture adds to the trainer's loss in one pass, and what is logged of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...errors import PeftMoeError
from ...routers import Router
from ...routers.losses import (
    LOSSES,
    active_losses,
    auxiliary_losses,
    check_loss_names,
    loss_options,
    orthogonality_loss,
)
from ...routing.context import RoutingRecord
from ...tuner.config.mixture import MoLoraConfig
from ...tuner.layers.linear import MoLoraLayer

# The one loss on the experts' own weights; the others are on decisions, and registered.
_ON_EXPERTS = "expert_orthogonality_coef"


def log_name(name: str) -> str:
    """Return the log entry of a loss, given its key: a config field or a key of ``loss_coefs``."""
    return "expert_orthogonality_loss" if name == _ON_EXPERTS else LOSSES[name].log


class AuxiliaryTerms:
    """The weighted losses on decisions and on experts.

    Args:
        config: the mixture's.
        adapter: its name.
        values: numbers that move between steps; ``l1_weight`` replaces ``router_l1_coef`` if it is there.
    """

    def __init__(self, config: MoLoraConfig, adapter: str, values: dict[str, float]) -> None:
        self.config, self.adapter, self.values = config, adapter, values
        check_loss_names(config.loss_coefs)  # a config that was loaded for inference has not been checked
        self.options = loss_options(config)

    def weight(self, name: str) -> float:
        """Return the current factor of the loss with this key."""
        if name == _ON_EXPERTS:
            return float(self.config.expert_orthogonality_coef)
        value = LOSSES[name].coefficient(self.config)
        return float(self.values.get("l1_weight", value) if name == "router_l1_coef" else value)

    def losses(
        self, record: RoutingRecord, routers: Mapping[str, Router], model: nn.Module
    ) -> dict[str, Tensor]:
        """Compute the unweighted losses of one pass, by key.

        Args:
            record: of the pass; without domains, the losses about them are left out.
            routers: by the name under which their decisions are recorded.
            model: whose experts are compared, where ``expert_orthogonality_coef`` asks for it.

        Raises:
            PeftMoeError: losses are asked for, and the pass recorded no decision.
        """
        names = active_losses(self.config)
        if record.context is not None and record.context.domains is None:
            names = [name for name in names if not LOSSES[name].needs_domains]
        settings = {name: router.settings for name, router in routers.items()}
        losses = auxiliary_losses(record, names, settings=settings, options=self.options)
        if names and not losses:
            raise PeftMoeError(
                f"{names[0]} is set, but this pass recorded no routing decision; is the adapter "
                f"{self.adapter!r} active and enabled?"
            )
        if self.config.expert_orthogonality_coef != 0:
            losses[_ON_EXPERTS] = self._orthogonality(model)
        return losses

    def _orthogonality(self, model: nn.Module) -> Tensor:
        found = []
        for module in model.modules():
            if isinstance(module, MoLoraLayer) and self.adapter in module.molora_A:
                ranks = module.mixtures[self.adapter].rank_map.ranks
                if sum(rank > 0 for rank in ranks) > 1:
                    found.append(orthogonality_loss(module.molora_A[self.adapter].weight, ranks))  # type: ignore[arg-type]
        if not found:
            raise PeftMoeError(
                f"expert_orthogonality_coef={self.config.expert_orthogonality_coef} has no effect: no "
                "layer has two experts; set it to 0"
            )
        return torch.stack([loss.to(found[0].device) for loss in found]).mean()
