"""Float32 scores of a narrower input, without a float32 copy of all of it, now or for the backward pass.

Letters: N tokens of a part, I in, X columns; "…" is B, T, or whatever comes before.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..ops.once_differentiable import Gradients, once_differentiable

# Larger inputs are widened in parts. On a CPU one of this size is still in the cache when it is read: of 512
# tokens with 5504 features, eight scores took 1.0 ms in such parts and 3.3 ms at once. Smaller parts are
# slower again.
PART_BYTES = 2**20
# Of so few columns, weights times inputs is up to 1.6 times faster than inputs times weights. With three or
# less its bits would depend on where the weights lie, which is never the same in a model that was loaded.
_FEW_COLUMNS = range(4, 16)
# Of these, neither of it is worth a call.
_FEW_ROWS = 16


class UpcastCache:
    """The small input that was upcast last: queries, keys and values are computed from the same one.

    The cache knows the input by its identity and by the count of its changes in place, and does not keep it
    alive.
    """

    def __init__(self) -> None:
        self._x: weakref.ref[Tensor] | None = None

    def find(self, x: Tensor) -> Tensor | None:
        """Return ``x`` in float32 if it is the input that was upcast last, unchanged; else None."""
        if self._x is None or self._x() is not x or x._version != self._version:
            return None
        return self._fp32

    def make(self, x: Tensor) -> Tensor | None:
        """Return ``x`` in float32; None where it is float32, large, or its changes are not counted."""
        small = 4 * x.numel() <= PART_BYTES and x.dtype.itemsize < 4
        # torch does not count the changes of tensors that were made in inference mode.
        if not small or torch.is_grad_enabled() or x.is_inference():
            return None
        fp32 = self.find(x)
        if fp32 is None:
            fp32 = self._fp32 = x.to(torch.float32)
            self._x, self._version = weakref.ref(x), x._version
        return fp32


def widened(x_BTI: Tensor, normed: bool) -> Tensor:
    """What scorers see: in float32 or wider, divided by the root mean square where that is asked for."""
    # A float64 model gets float64 decisions; nothing gets fewer than 32 bits.
    fp32_BTI = x_BTI if x_BTI.dtype.itemsize >= 4 else x_BTI.to(torch.float32)
    return functional.rms_norm(fp32_BTI, (fp32_BTI.shape[-1],)) if normed else fp32_BTI


def fp32_linear(x: Tensor, weight_XI: Tensor, bias_X: Tensor | None, normed: bool) -> Tensor:
    """``linear(widened(x))``, [..., I] to [..., X]; of the input, only ``x`` is kept for a backward pass."""
    if not torch.is_grad_enabled():
        return _scores(x, weight_XI, bias_X, normed)
    out: Tensor = _Fp32Linear.apply(x, weight_XI, bias_X, normed)  # type: ignore[no-untyped-call]
    return out


def _scores(x: Tensor, weight_XI: Tensor, bias_X: Tensor | None, normed: bool) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if weight_XI.dtype != wide:  # a call without effect costs as much as the product, at one token
        weight_XI, bias_X = weight_XI.to(wide), None if bias_X is None else bias_X.to(wide)
    columns, features = weight_XI.shape
    if not x.is_cpu or x.numel() < _FEW_ROWS * features:
        return functional.linear(widened(x, normed), weight_XI, bias_X)
    parts = []
    for part_NI in _parts(x):
        fp32_NI = widened(part_NI, normed)
        if columns not in _FEW_COLUMNS:
            parts.append(functional.linear(fp32_NI, weight_XI, bias_X))
        elif bias_X is None:
            parts.append((weight_XI @ fp32_NI.T).T)
        else:
            parts.append(torch.addmm(bias_X[:, None], weight_XI, fp32_NI.T).T)
    scores = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
    return scores.view(*x.shape[:-1], columns)


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    """Its tokens [N, I], in as many at a time as are worth it."""
    flat = x.reshape(-1, x.shape[-1])
    if not x.is_cpu:
        return (flat,)
    rows = PART_BYTES // (4 * x.shape[-1])
    return torch.split(flat, max(_FEW_ROWS, rows // _FEW_ROWS * _FEW_ROWS))


class _Fp32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_XI: Tensor, bias_X: Tensor | None, normed: bool) -> Tensor:
        ctx.save_for_backward(x, weight_XI)
        ctx.normed = normed
        return _scores(x, weight_XI, bias_X, normed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> Gradients:
        x, weight_XI = ctx.saved_tensors
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        parts, dz_NX = _parts(x), dz.reshape(-1, dz.shape[-1])
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if for_x else None
        dx_parts = parts if dx is None else _parts(dx)
        dweight_XI = torch.zeros_like(weight_XI, dtype=dz.dtype) if for_weight else None
        given = zip(parts, dx_parts, torch.split(dz_NX, len(parts[0])), strict=True)
        for part_NI, dx_part_NI, dpart_NX in given if for_x or for_weight else ():
            fp32_NI = widened(part_NI, ctx.normed) if for_weight or ctx.normed else None
            if dweight_XI is not None:
                assert fp32_NI is not None
                dweight_XI.addmm_(dpart_NX.T, fp32_NI)
            if for_x:
                dx_NI = dpart_NX @ weight_XI.to(dz.dtype)
                if ctx.normed:
                    assert fp32_NI is not None
                    dx_NI = _through_norm(dx_NI, fp32_NI, part_NI)
                dx_part_NI.copy_(dx_NI)
        return (
            dx,
            dweight_XI.to(weight_XI.dtype) if dweight_XI is not None else None,
            dz_NX.sum(0).to(weight_XI.dtype) if for_bias else None,
            None,
        )


def _through_norm(df_NI: Tensor, f_NI: Tensor, x_NI: Tensor) -> Tensor:
    # f = x·ρ with ρ = (mean x² + ε)^-½, hence dx = ρ·(df - f·mean(df·f)).
    fp32_NI = x_NI.to(f_NI.dtype)
    squares_N1 = fp32_NI.square().mean(-1, keepdim=True) + torch.finfo(f_NI.dtype).eps
    return squares_N1.rsqrt() * (df_NI - f_NI * (df_NI * f_NI).mean(-1, keepdim=True))
