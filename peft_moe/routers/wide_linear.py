"""Float32 scores of a narrower input, without a float32 copy of it kept for the backward pass.

Letters: B batch, T sequence, I in, X columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..ops.twice import Gradients, once


def widened(x_BTI: Tensor, normed: bool) -> Tensor:
    """What scorers see: in float32 or wider, divided by the root mean square where that is asked for."""
    # A float64 model gets float64 decisions; nothing gets fewer than 32 bits.
    wide_BTI = x_BTI if x_BTI.dtype == torch.float64 else x_BTI.to(torch.float32)
    return functional.rms_norm(wide_BTI, (wide_BTI.shape[-1],)) if normed else wide_BTI


def wide_linear(x_BTI: Tensor, weight_XI: Tensor, bias_X: Tensor, normed: bool) -> Tensor:
    """``linear(widened(x))``, [B, T, X]; of the input, only ``x`` itself is kept for the backward pass."""
    out_BTX: Tensor = _WideLinear.apply(x_BTI, weight_XI, bias_X, normed)  # type: ignore[no-untyped-call]
    return out_BTX


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTI: Tensor, weight_XI: Tensor, bias_X: Tensor, normed: bool) -> Tensor:
        ctx.save_for_backward(x_BTI, weight_XI)
        ctx.normed = normed
        wide_BTI = widened(x_BTI, normed)
        return functional.linear(wide_BTI, weight_XI.to(wide_BTI.dtype), bias_X.to(wide_BTI.dtype))

    @staticmethod
    @once
    def backward(ctx: Any, dz_BTX: Tensor) -> Gradients:
        x_BTI, weight_XI = ctx.saved_tensors
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        dx_BTI = dweight_XI = dbias_X = None
        wide_BTI = widened(x_BTI, ctx.normed) if for_weight or ctx.normed else None
        if for_weight:
            assert wide_BTI is not None
            dweight_XI = (dz_BTX.flatten(0, -2).T @ wide_BTI.flatten(0, -2)).to(weight_XI.dtype)
        if for_bias:
            dbias_X = dz_BTX.flatten(0, -2).sum(0).to(weight_XI.dtype)
        if for_x:
            dx_BTI = dz_BTX @ weight_XI.to(dz_BTX.dtype)
            if ctx.normed:
                assert wide_BTI is not None
                dx_BTI = _through_norm(dx_BTI, wide_BTI, x_BTI)
            dx_BTI = dx_BTI.to(x_BTI.dtype)
        return dx_BTI, dweight_XI, dbias_X, None


def _through_norm(df_BTI: Tensor, f_BTI: Tensor, x_BTI: Tensor) -> Tensor:
    # f = x·ρ with ρ = (mean x² + ε)^-½, hence dx = ρ·(df - f·mean(df·f)).
    wide_BTI = x_BTI.to(f_BTI.dtype)
    squares_BT1 = wide_BTI.square().mean(-1, keepdim=True) + torch.finfo(f_BTI.dtype).eps
    return squares_BT1.rsqrt() * (df_BTI - f_BTI * (df_BTI * f_BTI).mean(-1, keepdim=True))
