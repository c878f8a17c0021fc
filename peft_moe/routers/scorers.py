"""The scorers that need no fitting: uniform, linear, random.

Letters: B batch, T sequence, I in, X experts plus the null expert.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .registry import Scorer, register_router
from .settings import RouterSettings


@register_router("uniform")
class UniformScorer(Scorer):
    """Gate-less: every expert weighs the same (arXiv 2408.17280, section 2)."""

    reads_input = False
    trainable = False
    paper = "arXiv 2408.17280"

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(1, 1, self.settings.num_columns)


@register_router("linear")
class LinearScorer(Scorer):
    """One linear map from the input to the scores (Shazeer et al., arXiv 1701.06538, without noise).

    With ``init_std=0`` all scores start equal, so that a dense mixture begins as the gate-less one.
    """

    paper = "arXiv 1701.06538"

    def __init__(self, settings: RouterSettings, in_features: int) -> None:
        super().__init__(settings, in_features)
        self.weight = nn.Parameter(torch.empty(settings.num_columns, in_features, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(settings.num_columns, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial weights: normal with standard deviation ``init_std``; the bias starts at zero."""
        nn.init.normal_(self.weight, std=self.settings.init_std)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


@register_router("random")
class RandomScorer(LinearScorer):
    """A fixed linear map drawn at random: the paper's noisy gate, which nobody trains."""

    trainable = False
    paper = "arXiv 2408.17280"
