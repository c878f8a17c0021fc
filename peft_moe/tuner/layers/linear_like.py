"""What counts as a linear layer, and the small change of one that carries experts.

Letters: N tokens, I in, R total rank, E experts.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(I, O) of a linear-like layer, None for anything else."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    if isinstance(module, nn.Embedding | nn.modules.conv._ConvNd | nn.Bilinear):
        return None
    in_features, out_features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(in_features, int) and isinstance(out_features, int):
        return in_features, out_features
    return None


def as_linear(weight_RX: Tensor) -> nn.Linear:
    """A module that holds a factor [R, I] or [R, O] as its weight."""
    # Made on "meta", so that no time goes into random numbers that the weight replaces at once.
    linear = nn.Linear(weight_RX.shape[1], weight_RX.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight_RX)
    return linear
