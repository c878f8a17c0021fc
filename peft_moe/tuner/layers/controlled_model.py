"""The controls as methods of a model with mixtures. They check names at once."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from ...errors import PeftMoeError
from ...routing.context import Controls
from ...routing.controls import use_experts, use_gates, use_temperature
from ..config.mixture import MoLoraConfig
from .resolve_controls import constraints_of, fixed_gates


class Controlled:
    """Methods of the tuner, and so of a PeftModel: ``with model.use_experts("math", "law"): …``."""

    peft_config: dict[str, Any]
    active_adapters: list[str]

    def use_experts(self, *names: str) -> AbstractContextManager[None]:
        """Do what :func:`peft_moe.use_experts` does; unknown names raise here."""
        block = use_experts(*names)
        for adapter, config in self._active_mixtures().items():
            constraints_of(Controls(experts=names), adapter, config)
        return block

    def use_gates(self, weights: Mapping[str, float]) -> AbstractContextManager[None]:
        """Do what :func:`peft_moe.use_gates` does; unknown names raise here."""
        block = use_gates(weights)
        for adapter, config in self._active_mixtures().items():
            fixed_gates(weights, adapter, config)
        return block

    def use_temperature(self, temperature: float) -> AbstractContextManager[None]:
        """Do what :func:`peft_moe.use_temperature` does."""
        self._active_mixtures()
        return use_temperature(temperature)

    def _active_mixtures(self) -> dict[str, MoLoraConfig]:
        active = {a: self.peft_config[a] for a in self.active_adapters if a in self.peft_config}
        mixtures = {a: config for a, config in active.items() if isinstance(config, MoLoraConfig)}
        if not mixtures:
            raise PeftMoeError(f"no mixture is active; set_adapter() one of {sorted(self.peft_config)}")
        return mixtures
