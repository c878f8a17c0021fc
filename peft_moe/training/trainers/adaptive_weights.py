"""How much the language model's loss and the distillation each weigh, from how much each has fallen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class AdaptiveWeights:
    """Factors of the two losses by how much each has still to fall; both 1 at first, their sum always 2.

    Each loss is smoothed over steps and divided by its value in the first step: r = L̄ / L₀, the share that
    is left (the loss ratio of GradNorm, arXiv 1711.02257). The factors are 2·r_CE/(r_CE + r_KD) and
    2·r_KD/(r_CE + r_KD). A published scheme adds up ΔL/L̄ and clips the sum to [0, 1]: falling losses have
    negative differences, hence sum 0, hence equal weights for as long as both fall.

    Args:
        values: where the smoothed and the first losses are kept.
    """

    SMOOTHING = 0.9

    def __init__(self, values: dict[str, float]) -> None:
        self.values = values
        self._step: Tensor | None = None

    @property
    def factors(self) -> tuple[float, float]:
        """Of the language model's loss and of the distillation."""
        left = [self._left("language_loss"), self._left("distillation_loss")]
        total = sum(left)
        return (2 * left[0] / total, 2 * left[1] / total) if total > 0 else (1.0, 1.0)

    def _left(self, name: str) -> float:
        first = self.values.get(f"first_{name}", 0.0)
        return self.values[name] / first if first > 0 else 1.0

    def count(self, language: Tensor, distillation: Tensor) -> None:
        """Add what one micro-batch contributes to the two losses of the step."""
        both = torch.stack((language.detach().float(), distillation.detach().float().to(language.device)))
        self._step = both if self._step is None else self._step + both

    def step(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Take in the losses of one optimizer step.

        Args:
            mean: makes the mean over processes of a tensor.
        """
        if self._step is None:
            return
        found = mean(self._step).tolist()
        self._step = None
        for name, value in zip(("language_loss", "distillation_loss"), found, strict=True):
            self.values.setdefault(f"first_{name}", value)
            before = self.values.get(name, value)
            self.values[name] = self.SMOOTHING * before + (1 - self.SMOOTHING) * value
