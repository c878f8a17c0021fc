"""Tokens sorted by expert: only the chosen experts' products are computed.

Letters: N tokens, P chosen pairs sorted by expert, I in, O out, R total rank, E experts, K chosen experts,
W ranks of one expert.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..backend import NO_TOP_K, CallSpec, MixInputs, product_dtype
from ..device_costs import Constants
from ..once_differentiable import Gradients, once_differentiable
from ..rank_map import RankMap
from ..token_groups import Groups, group, regroup

_NATIVE = (torch.bfloat16, torch.float16, torch.float32)


class Grouped:
    """The chosen experts' products, one group of tokens per expert."""

    name = "grouped"

    def supports(self, spec: CallSpec) -> str | None:
        """Refuse dense gates and torch.compile; on an accelerator also what torch's grouped GEMM refuses."""
        if spec.chosen is None:
            return NO_TOP_K
        if spec.compiling:
            return "torch.compile cannot trace the sorting of tokens"
        if spec.device != "cpu":
            sizes = (spec.in_features, spec.out_features)
            return why_not_native(spec.ranks, spec.dtype, spec.device, *sizes)
        return None

    def cost(self, spec: CallSpec, constants: Constants) -> float:
        """Count chosen products, passes over gathered rows, the factors and a fixed cost per group."""
        pairs, rank, item = spec.tokens * (spec.chosen or 0), spec.ranks.width, spec.dtype.itemsize
        experts = len(spec.ranks.ranks)
        share = (spec.chosen or 0) / experts
        # The expected number of experts that at least one token chooses, if choices are even.
        hit = experts * (1 - (1 - min(share, 1.0)) ** spec.tokens)
        work = 2 * pairs * rank * spec.sizes / constants.flops
        rows = constants.passes * pairs * spec.sizes * item / constants.bandwidth
        weights = hit * rank * spec.sizes * item / constants.weight_bandwidth
        return work + rows + weights + hit * constants.segment + constants.sort

    def mix(self, inputs: MixInputs) -> Tensor:
        """Return ``base + Σ over the chosen pairs``."""
        ids_NK, weights_NK = inputs.choice_per_token()
        leaves = (inputs.x, inputs.A, inputs.B, weights_NK)
        rest = (inputs.base, ids_NK, inputs.ranks, inputs.dtype or product_dtype(inputs.x, inputs.A))
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in leaves):
            return _forward(*leaves, *rest, inputs.overwrite)[0]
        out_NO: Tensor = _Grouped.apply(*leaves, *rest)  # type: ignore[no-untyped-call]  # torch's own
        return out_NO


def why_not_native(ranks: RankMap, dtype: torch.dtype, device: str, *sizes: int) -> str | None:
    """Return the reason why torch's grouped GEMM cannot serve, or None if it can."""
    waits = device == "cuda" and not (dtype == torch.bfloat16 and _has_kernel())
    reasons = {
        f"torch {torch.__version__} has no grouped_mm": not hasattr(torch.nn.functional, "grouped_mm"),
        "torch's grouped GEMM needs experts of one rank": not ranks.equal,
        f"torch's grouped GEMM does not support {dtype}": dtype not in _NATIVE,
        "torch's grouped GEMM needs rows of rank and widths in multiples of 16 bytes": any(
            size * dtype.itemsize % 16 for size in (ranks.width, *sizes)
        ),
        "torch's grouped GEMM would wait for the host: only bfloat16 on sm_90 or sm_100 has a kernel": waits,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


@cache
def _has_kernel() -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability()[0] in (9, 10)


def _forward(
    x_NI: Tensor,
    A_RI: Tensor,
    B_RO: Tensor,
    weights_NK: Tensor,
    base_NO: Tensor,
    ids_NK: Tensor,
    ranks: RankMap,
    dtype: torch.dtype,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Groups]:
    """Return the output, h at the chosen pairs [P, W], and the groups."""
    device = x_NI.device.type
    sizes = (A_RI.shape[1], B_RO.shape[1])
    # On a CPU, bins and tiles are faster in narrow dtypes; see token_groups.
    native = why_not_native(ranks, dtype, device, *sizes) is None and (device != "cpu" or dtype.itemsize == 4)
    groups = group(ids_NK, ranks, native, dtype)
    h_PW = groups.up(x_NI.to(dtype), A_RI.to(dtype))
    hg_PW = _gated(h_PW, weights_NK, ids_NK, groups)
    out_NO = base_NO if overwrite else base_NO.clone()
    return groups.down(hg_PW, B_RO.to(dtype), out_NO), h_PW, groups


def _gated(h_PW: Tensor, weights_NK: Tensor, ids_NK: Tensor, groups: Groups) -> Tensor:
    weights_N = groups.ranks.scale_chosen(weights_NK, ids_NK).flatten()
    weights_P1 = weights_N.index_select(0, groups.order).to(h_PW.dtype)[:, None]
    gated_PW = h_PW * weights_P1
    if groups.layout == "native":
        absent_P1 = ids_NK.flatten().index_select(0, groups.order)[:, None] == len(groups.ranks.ranks)
        gated_PW = gated_PW.masked_fill(absent_P1, 0.0)
    return gated_PW


class _Grouped(torch.autograd.Function):
    """Saves only what the requested gradients need: x for A; h for gates and B; the order of the pairs."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        A_RI: Tensor,
        B_RO: Tensor,
        weights_NK: Tensor,
        base_NO: Tensor,
        ids_NK: Tensor,
        ranks: RankMap,
        dtype: torch.dtype,
    ) -> Tensor:
        with torch.autocast(x_NI.device.type, enabled=False):
            out_NO, h_PW, groups = _forward(x_NI, A_RI, B_RO, weights_NK, base_NO, ids_NK, ranks, dtype)
        for_x, for_A, for_B, for_gates = ctx.needs_input_grad[:4]
        ctx.save_for_backward(
            x_NI if for_A else None,
            A_RI if for_x else None,
            B_RO,
            weights_NK,
            ids_NK,
            h_PW if for_gates or for_B else None,
            _compact(groups.order),
            groups.ends,
        )
        ctx.ranks, ctx.dtype = ranks, dtype
        ctx.x_shape, ctx.x_dtype, ctx.A_dtype = x_NI.shape, x_NI.dtype, A_RI.dtype
        ctx.layout, ctx.counts = groups.layout, groups.counts
        return out_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: Tensor) -> Gradients:
        x_NI, A_RI, B_RO, weights_NK, ids_NK, h_PW, order, ends = ctx.saved_tensors
        dtype, ranks = ctx.dtype, ctx.ranks
        for_x, for_A, for_B, for_gates, for_base = ctx.needs_input_grad[:5]
        dx_NI = dA_RI = dB_RO = dweights_NK = None
        with torch.autocast(dy_NO.device.type, enabled=False):
            groups = regroup(order.long(), ids_NK, ranks, ctx.layout, ends, ctx.counts)
            dy_cast_NO = dy_NO.to(dtype).contiguous()
            if for_x or for_A or for_gates:
                dhg_PW = groups.up(dy_cast_NO, B_RO.to(dtype))
            if for_gates:
                dweights_NK = _weight_gradient(dhg_PW, h_PW, weights_NK, ids_NK, groups)
            if for_x or for_A:
                dh_PW = _gated(dhg_PW, weights_NK, ids_NK, groups)
                if for_x:
                    dx_NI = groups.down(dh_PW, A_RI.to(dtype), dh_PW.new_zeros(ctx.x_shape)).to(ctx.x_dtype)
                if for_A:
                    dA_RI = groups.outer(dh_PW, x_NI.to(dtype)).to(ctx.A_dtype)
            if for_B:
                dB_RO = groups.outer(_gated(h_PW, weights_NK, ids_NK, groups), dy_cast_NO).to(B_RO.dtype)
        return dx_NI, dA_RI, dB_RO, dweights_NK, dy_NO if for_base else None, None, None, None


def _compact(order: Tensor) -> Tensor:
    """Return the order in the smallest integer dtype that holds it."""
    return order.to(torch.uint16 if len(order) < 2**16 else torch.int32)


def _weight_gradient(
    dhg_PW: Tensor, h_PW: Tensor, weights_NK: Tensor, ids_NK: Tensor, groups: Groups
) -> Tensor:
    # The sum over ranks is in float32: a bf16 sum would lose two digits of the router's gradient.
    products_PW = dhg_PW.to(torch.promote_types(dhg_PW.dtype, torch.float32)) * h_PW
    sums_N = products_PW.new_zeros(weights_NK.numel()).index_copy(0, groups.order, products_PW.sum(-1))
    sums_NK = sums_N.view(weights_NK.shape).masked_fill(ids_NK == len(groups.ranks.ranks), 0.0)
    return groups.ranks.scale_chosen(sums_NK, ids_NK).to(weights_NK.dtype)
