"""Scorers that do not read their input: uniform, static, and noise that is drawn anew in every call.

Letters: B batch, T sequence, I in, X columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..scorer import Scorer, register_router
from ..settings import RouterSettings


@register_router("uniform")
class UniformScorer(Scorer):
    """Gate-less: every expert weighs the same (arXiv 2408.17280, section 2).

    All scores are 1, so that with ``scoring_func="none"`` the gates are the scaling factor itself: the
    plain sum of the experts, times λ (task arithmetic, arXiv 2212.04089).
    """

    reads_input = False
    trainable = False
    paper = "arXiv 2408.17280"

    def forward(self, x: Tensor) -> Tensor:
        return x.new_ones(1, 1, self.settings.num_columns)


@register_router("static")
class StaticScorer(Scorer):
    """One learnt number per expert, the same for every input (LoraHub, 2307.13269; CAT, 2410.13025).

    With ``scoring_func="none"`` the numbers are the gates, and start as 1/X each: as the gate-less
    mixture. With "softmax" they are scores, and start equal.
    """

    reads_input = False
    paper = "arXiv 2410.13025"

    def __init__(self, settings: RouterSettings, in_features: int) -> None:
        super().__init__(settings, in_features)
        self.weight = nn.Parameter(torch.empty(settings.num_columns, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All alike, plus normal noise of ``init_std``."""
        self.weight.data.fill_(1.0 / self.settings.num_columns)
        self.weight.data.add_(torch.randn_like(self.weight) * self.settings.init_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.to(x.dtype)[None, None]


@register_router("noise")
class NoiseScorer(Scorer):
    """White noise of standard deviation ``init_std``, drawn for every token and call: the lower bound."""

    trainable = False
    draws = True
    paper = "arXiv 2408.17280"

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.settings.num_columns)
        return torch.randn(shape, dtype=x.dtype, device=x.device) * self.settings.init_std
