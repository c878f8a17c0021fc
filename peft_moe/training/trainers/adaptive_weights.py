"""Adaptive weights of the language model's loss and the distillation loss."""

from __future__ import annotations

import torch
from torch import Tensor

from .distributed import mean_over_processes


class AdaptiveWeights:
    """Weighs two losses by the share of each that is left; both factors start at 1 and always sum to 2.

    Each loss is smoothed over steps and divided by its value in the first step: r = L̄ / L₀, the share that
    is left (the loss ratio of GradNorm, arXiv 1711.02257). The factors are 2·r_CE/(r_CE + r_KD) and
    2·r_KD/(r_CE + r_KD). A published scheme instead adds up ΔL/L̄ and clips the sum to [0, 1]. Falling losses
    have negative differences, so that this sum is 0 and the weights are equal for as long as both losses
    fall.

    Args:
        values: stores the smoothed losses and those of the first step.
    """

    SMOOTHING = 0.9

    def __init__(self, values: dict[str, float]) -> None:
        self.values = values
        self._step: Tensor | None = None

    @property
    def factors(self) -> tuple[float, float]:
        """The factors of the language model's loss and of the distillation loss."""
        left = [self._share_left("language_loss"), self._share_left("distillation_loss")]
        total = sum(left)
        return (2 * left[0] / total, 2 * left[1] / total) if total > 0 else (1.0, 1.0)

    def _share_left(self, name: str) -> float:
        first_step = self.values.get(f"first_{name}", 0.0)
        return self.values[name] / first_step if first_step > 0 else 1.0

    def count(self, language: Tensor, distillation: Tensor) -> None:
        """Add what one micro-batch contributes to the two losses of the step."""
        losses = torch.stack((language.detach().float(), distillation.detach().float().to(language.device)))
        self._step = losses if self._step is None else self._step + losses

    def step(self) -> None:
        """Smooth the losses with those of the optimizer step that ends, averaged over processes."""
        if self._step is None:
            return
        losses = mean_over_processes(self._step).tolist()
        self._step = None
        for name, value in zip(("language_loss", "distillation_loss"), losses, strict=True):
            self.values.setdefault(f"first_{name}", value)
            smoothed = self.values.get(name, value)
            self.values[name] = self.SMOOTHING * smoothed + (1 - self.SMOOTHING) * value
