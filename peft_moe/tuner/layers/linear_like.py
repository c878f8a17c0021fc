"""What counts as a linear layer, and the small change of one that carries experts.

Letters: N tokens, I in, R total rank, E experts.
"""

from __future__ import annotations

from typing import overload

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import PeftMoeError


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


def gives_new_memory(module: nn.Module) -> bool:
    """Whether nobody but its caller can hold what a linear layer returns, so that it may be overwritten."""
    # A hook may keep it, and what is put in place of a method may do anything.
    hooked = module._forward_hooks or nn.modules.module._has_any_global_hook()
    return type(module) in (nn.Linear, Conv1D) and not hooked and "forward" not in module.__dict__


def as_linear(weight_RX: Tensor) -> nn.Linear:
    """A module that holds a factor [R, I] or [R, O] as its weight."""
    # Made on "meta", so that no time goes into random numbers that the weight replaces at once.
    linear = nn.Linear(weight_RX.shape[1], weight_RX.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight_RX)
    return linear


@overload
def per_token(values: Tensor, x: Tensor, tokens: int) -> Tensor: ...
@overload
def per_token(values: None, x: Tensor, tokens: int) -> None: ...
def per_token(values: Tensor | None, x: Tensor, tokens: int) -> Tensor | None:
    """Part of a decision, [1, E] where it is constant, else [N, E] for the tokens of ``x`` [..., I]."""
    if values is None:
        return None
    rows, columns, last = values.shape
    if rows == columns == 1:
        return values.view(1, last)
    # Several images or windows of one text: whose they are is not known here.
    same_rows = x.dim() < 3 or x.shape[0] in (rows, 1)
    if columns == 1 and rows != tokens and same_rows:
        # One decision per sequence; the layer may see [B, T, I] or the same tokens flattened.
        values = values.expand(rows, tokens // rows, last)
    if values.shape[0] * values.shape[1] != tokens:
        raise PeftMoeError(
            f"the decision covers {rows}×{columns} tokens, the layer was given {tuple(x.shape[:-1])}; "
            "this layer sees other tokens than the router: use router_scope='module' or leave it out of "
            "target_modules"
        )
    return values.reshape(tokens, last)
