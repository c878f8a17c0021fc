"""All experts as one LoRA whose rank axis is gated: two matrix products, no loop, exact for any gates.

With top-k, the backward pass keeps h = x Aᵀ at the chosen experts only, so that the saved memory of a layer
does not grow with the number of experts. An expert then has no effect on a token that did not choose it, not
even if its h is infinite.

Letters: N tokens, I in, O out, R total rank, E experts, K chosen experts, W ranks of one expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..backend import CallSpec, MixInputs, product_dtype
from ..chosen_ranks import ChosenRanks
from ..device_costs import Constants
from ..mix import add_product
from ..once_differentiable import Gradients, once_differentiable
from ..rank_map import RankMap


class Stacked:
    """Every expert on every token, in two products."""

    name = "stacked"

    def supports(self, spec: CallSpec) -> str | None:
        """Return None: every call is supported."""
        return None

    def cost(self, spec: CallSpec, constants: Constants) -> float:
        """Count two products over all ranks, or their memory traffic if that is longer, and the gating."""
        ranks, item = spec.ranks.total, spec.dtype.itemsize
        work = 2 * spec.tokens * ranks * spec.sizes / constants.flops
        # x and the factors are read, y is read and written.
        rows = spec.tokens * (spec.in_features + 2 * spec.out_features)
        traffic = (rows + ranks * spec.sizes) * item / constants.bandwidth
        return max(work, traffic) + constants.per_rank * spec.tokens * ranks + constants.launch

    def mix(self, inputs: MixInputs) -> Tensor:
        """Return ``base + ((x Aᵀ) ∘ gates per rank) B``."""
        x_NI, A_RI, B_RO, gates, ranks, base_NO, ids_NK, _, may_select_null, overwrite, *_ = inputs
        if ids_NK is not None:
            ids_NK, gates = inputs.choice_per_token()
        dtype = inputs.dtype or product_dtype(x_NI, A_RI)
        leaves = (x_NI, A_RI, B_RO, gates)
        # torch.compile decides by itself what it keeps for the backward pass.
        plain = torch.compiler.is_compiling() or not torch.is_grad_enabled()
        if plain or not any(t.requires_grad for t in leaves):
            return _forward(*leaves, base_NO, ids_NK, ranks, dtype, may_select_null, overwrite)[0]
        out_NO: Tensor = _Stacked.apply(*leaves, base_NO, ids_NK, ranks, dtype, may_select_null)  # type: ignore[no-untyped-call]  # torch's own
        return out_NO


def _forward(
    x_NI: Tensor,
    A_RI: Tensor,
    B_RO: Tensor,
    gates: Tensor,
    base_NO: Tensor,
    ids_NK: Tensor | None,
    ranks: RankMap,
    dtype: torch.dtype,
    may_select_null: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the output, and h: [N, R], or [N, K, W] at the chosen experts."""
    h_NR = functional.linear(x_NI.to(dtype), A_RI.to(dtype)).to(dtype)
    if ids_NK is None:
        # Gates are scaled before they are rounded to the products' dtype.
        hg_NR = h_NR * ranks.expand(gates).to(dtype)
        return add_product(base_NO, hg_NR, B_RO.to(dtype), overwrite), h_NR
    chosen = ChosenRanks(ids_NK, ranks, may_select_null)
    h_NKW = chosen.take(h_NR)
    hg_NR = chosen.put(chosen.weigh(h_NKW, gates), h_NR)
    return add_product(base_NO, hg_NR, B_RO.to(dtype), overwrite), h_NKW


class _Stacked(torch.autograd.Function):
    """Saves only what the requested gradients need: x for A; h for gates and B; gates for x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        A_RI: Tensor,
        B_RO: Tensor,
        gates: Tensor,
        base_NO: Tensor,
        ids_NK: Tensor | None,
        ranks: RankMap,
        dtype: torch.dtype,
        may_select_null: bool,
    ) -> Tensor:
        with torch.autocast(x_NI.device.type, enabled=False):
            out_NO, h = _forward(x_NI, A_RI, B_RO, gates, base_NO, ids_NK, ranks, dtype, may_select_null)
        for_x, for_A, for_B, for_gates = ctx.needs_input_grad[:4]
        ctx.save_for_backward(
            x_NI if for_A else None,
            A_RI if for_x else None,
            B_RO,
            gates,
            ids_NK,
            h if for_gates or for_B else None,
        )
        ctx.may_select_null = may_select_null
        ctx.ranks, ctx.dtype, ctx.x_dtype, ctx.A_dtype = ranks, dtype, x_NI.dtype, A_RI.dtype
        return out_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: Tensor) -> Gradients:
        x_NI, A_RI, B_RO, gates, ids_NK, h = ctx.saved_tensors
        ranks, dtype = ctx.ranks, ctx.dtype
        for_x, for_A, for_B, for_gates, for_base = ctx.needs_input_grad[:5]
        chosen = None if ids_NK is None else ChosenRanks(ids_NK, ranks, ctx.may_select_null)
        dx_NI = dA_RI = dB_RO = dgates = None
        with torch.autocast(dy_NO.device.type, enabled=False):
            dy_cast_NO = dy_NO.to(dtype)
            if for_x or for_A or for_gates:
                dhg = dy_cast_NO @ B_RO.to(dtype).T
                dhg = dhg if chosen is None else chosen.take(dhg)
            if for_gates:
                dgates = _gate_gradient(dhg, h, gates, chosen, ranks)
            if for_x or for_A:
                dh_NR = _gated(dhg, gates, chosen, ranks)
                dx_NI = (dh_NR @ A_RI.to(dtype)).to(ctx.x_dtype) if for_x else None
                dA_RI = (dh_NR.T @ x_NI.to(dtype)).to(ctx.A_dtype) if for_A else None
            if for_B:
                dB_RO = (_gated(h, gates, chosen, ranks).T @ dy_cast_NO).to(B_RO.dtype)
        return dx_NI, dA_RI, dB_RO, dgates, dy_NO if for_base else None, None, None, None, None


def _gated(values: Tensor, gates: Tensor, chosen: ChosenRanks | None, ranks: RankMap) -> Tensor:
    if chosen is None:
        return values * ranks.expand(gates).to(values.dtype)
    return chosen.put(chosen.weigh(values, gates))


def _gate_gradient(
    dhg: Tensor, h: Tensor, gates: Tensor, chosen: ChosenRanks | None, ranks: RankMap
) -> Tensor:
    # The sum over ranks is in float32: a bf16 sum would lose two digits of the router's gradient.
    products = dhg.to(torch.promote_types(dhg.dtype, torch.float32)) * h
    if chosen is not None:
        return chosen.sums(products).to(gates.dtype)
    if gates.shape[0] == 1:
        products = products.sum(0, keepdim=True)
    return ranks.reduce(products).to(gates.dtype)
