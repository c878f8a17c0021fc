"""Scorers that learn to read their input: linear, its noisy and its frozen form, and two layers.

Letters: B batch, T sequence, I in, H hidden, X columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...io.offload import read
from ..scorer import Scorer, register_router
from ..settings import RouterSettings


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

    @property
    def is_linear(self) -> bool:
        """Whether no subclass adds to it."""
        mine, own = type(self), LinearScorer
        return mine.forward is own.forward and mine.score is own.score

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        dtype = x.dtype
        if weight.dtype != dtype:  # a call without effect costs as much as the product, at one token
            weight, bias = weight.to(dtype), bias.to(dtype)
        return functional.linear(x, weight, bias)


@register_router("gate")
class GateScorer(Scorer):
    """One linear map without a bias: the gate of Mixtral, Qwen2-MoE and Qwen3-MoE (arXiv 2401.04088).

    A block mixture with it is such a model, and can be exported as one.
    """

    paper = "arXiv 2401.04088"

    def __init__(self, settings: RouterSettings, in_features: int) -> None:
        super().__init__(settings, in_features)
        self.weight = nn.Parameter(torch.empty(settings.num_columns, in_features, dtype=torch.float32))
        nn.init.normal_(self.weight, std=settings.init_std)

    @property
    def is_linear(self) -> bool:
        """Whether no subclass adds to it."""
        mine, own = type(self), GateScorer
        return mine.forward is own.forward and mine.score is own.score

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype))


@register_router("random")
class RandomScorer(LinearScorer):
    """A fixed linear map drawn at random: the paper's noisy gate, which nobody trains."""

    trainable = False
    paper = "arXiv 2408.17280"


@register_router("noisy_linear")
class NoisyLinearScorer(LinearScorer):
    """Linear scores plus learnt noise in training: z = Wx + ε·softplus(Wₙx) (arXiv 1701.06538, eq. 4).

    Wₙ starts at zero, hence with noise of standard deviation log 2. Nothing is drawn outside of training.
    """

    paper = "arXiv 1701.06538"

    def __init__(self, settings: RouterSettings, in_features: int) -> None:
        super().__init__(settings, in_features)
        self.noise_weight = nn.Parameter(torch.zeros(settings.num_columns, in_features, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        scores_BTX = super().forward(x)
        if not self.training:
            return scores_BTX
        scale_BTX = functional.softplus(functional.linear(x, self.noise_weight.to(x.dtype)))
        return scores_BTX + torch.randn_like(scores_BTX) * scale_BTX


@register_router("mlp")
class MLPScorer(Scorer):
    """Two layers, z = W₂·silu(W₁x + b₁) + b₂: the head of X-LoRA (arXiv 2402.07148).

    W₂ starts with ``init_std``, 0 by default, so that a dense mixture begins as the gate-less one.
    """

    hidden_layer = True
    paper = "arXiv 2402.07148"

    def __init__(self, settings: RouterSettings, in_features: int) -> None:
        super().__init__(settings, in_features)
        self.hidden = nn.Linear(in_features, settings.hidden_size, dtype=torch.float32)
        self.out = nn.Linear(settings.hidden_size, settings.num_columns, dtype=torch.float32)
        nn.init.normal_(self.out.weight, std=settings.init_std)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden_BTH = _linear(self.hidden, x)
        return _linear(self.out, functional.silu(hidden_BTH))


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """In the dtype of the input: a float64 model gets float64 scores."""
    return functional.linear(x, read(layer).to(x.dtype), read(layer, "bias").to(x.dtype))
