"""All experts as one LoRA whose rank axis is gated: two matrix products, no loop, exact for any gates.

With top-k, h = x Aᵀ is kept for the backward pass at the chosen experts only, so that what a layer saves
does not grow with the number of experts. An expert that a token did not choose cannot touch it then, not
even one whose h is infinite.

Letters: N tokens, I in, O out, R total rank, E experts, K chosen experts, W ranks of one expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..backend import CallSpec, MixInputs, add_product, product_dtype
from ..chosen_ranks import ChosenRanks
from ..device_costs import Constants
from ..once_differentiable import Gradients, once_differentiable
from ..rank_map import RankMap


class Stacked:
    """Every expert on every token, in two products."""

    name = "stacked"

    def supports(self, spec: CallSpec) -> str | None:
        """Always."""
        return None

    def cost(self, spec: CallSpec, constants: Constants) -> float:
        """Two products over all ranks or their traffic, and the gating of every rank."""
        ranks, item = spec.ranks.total, spec.dtype.itemsize
        work = 2 * spec.tokens * ranks * spec.sizes / constants.flops
        # x is read; y is read and written; the factors are read.
        rows = spec.tokens * (spec.in_features + 2 * spec.out_features)
        traffic = (rows + ranks * spec.sizes) * item / constants.bandwidth
        return max(work, traffic) + constants.per_rank * spec.tokens * ranks + constants.launch

    def mix(self, inputs: MixInputs) -> Tensor:
        """``base + ((x Aᵀ) ∘ gates per rank) B``."""
        x_NI, A_RI, B_RO, gates, ranks, base_NO, ids_NK, _, may_select_null, overwrite, *_ = inputs
        if ids_NK is not None:
            ids_NK, gates = inputs.choice_per_token()
        wide = product_dtype(x_NI, A_RI)
        given = (x_NI, A_RI, B_RO, gates)
        # A compiler decides by itself what is kept for the backward pass.
        plain = torch.compiler.is_compiling() or not torch.is_grad_enabled()
        if plain or not any(t.requires_grad for t in given):
            return _forward(*given, base_NO, ids_NK, ranks, wide, may_select_null, overwrite)[0]
        out_NO: Tensor = _Stacked.apply(*given, base_NO, ids_NK, ranks, wide, may_select_null)  # type: ignore[no-untyped-call]
        return out_NO


def _forward(
    x_NI: Tensor,
    A_RI: Tensor,
    B_RO: Tensor,
    gates: Tensor,
    base_NO: Tensor,
    ids_NK: Tensor | None,
    ranks: RankMap,
    wide: torch.dtype,
    may_select_null: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """The output, and h: [N, R], or [N, K, W] at the chosen experts."""
    h_NR = functional.linear(x_NI.to(wide), A_RI.to(wide)).to(wide)
    if ids_NK is None:
        # Gates are scaled in float32 and rounded once.
        hg_NR = h_NR * ranks.expand(gates).to(wide)
        return add_product(base_NO, hg_NR, B_RO.to(wide), overwrite), h_NR
    chosen = ChosenRanks(ids_NK, ranks, may_select_null)
    h_NKW = chosen.take(h_NR)
    hg_NR = chosen.put(chosen.weigh(h_NKW, gates), h_NR)
    return add_product(base_NO, hg_NR, B_RO.to(wide), overwrite), h_NKW


class _Stacked(torch.autograd.Function):
    """Keeps what its gradients need: x for A; h for gates and B; gates for x, A and B."""

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
        wide: torch.dtype,
        may_select_null: bool,
    ) -> Tensor:
        with torch.autocast(x_NI.device.type, enabled=False):
            out_NO, h = _forward(x_NI, A_RI, B_RO, gates, base_NO, ids_NK, ranks, wide, may_select_null)
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
        ctx.ranks, ctx.wide, ctx.x_dtype, ctx.A_dtype = ranks, wide, x_NI.dtype, A_RI.dtype
        return out_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: Tensor) -> Gradients:
        x_NI, A_RI, B_RO, gates, ids_NK, h = ctx.saved_tensors
        ranks, wide = ctx.ranks, ctx.wide
        for_x, for_A, for_B, for_gates, for_base = ctx.needs_input_grad[:5]
        chosen = None if ids_NK is None else ChosenRanks(ids_NK, ranks, ctx.may_select_null)
        dx_NI = dA_RI = dB_RO = dgates = None
        with torch.autocast(dy_NO.device.type, enabled=False):
            wide_NO = dy_NO.to(wide)
            if for_x or for_A or for_gates:
                dhg = wide_NO @ B_RO.to(wide).T
                dhg = dhg if chosen is None else chosen.take(dhg)
            if for_gates:
                dgates = _gate_gradient(dhg, h, gates, chosen, ranks)
            if for_x or for_A:
                dh_NR = _gated(dhg, gates, chosen, ranks)
                dx_NI = (dh_NR @ A_RI.to(wide)).to(ctx.x_dtype) if for_x else None
                dA_RI = (dh_NR.T @ x_NI.to(wide)).to(ctx.A_dtype) if for_A else None
            if for_B:
                dB_RO = (_gated(h, gates, chosen, ranks).T @ wide_NO).to(B_RO.dtype)
        return dx_NI, dA_RI, dB_RO, dgates, dy_NO if for_base else None, None, None, None, None


def _gated(values: Tensor, gates: Tensor, chosen: ChosenRanks | None, ranks: RankMap) -> Tensor:
    if chosen is None:
        return values * ranks.expand(gates).to(values.dtype)
    return chosen.put(chosen.weigh(values, gates))


def _gate_gradient(dhg: Tensor, h: Tensor, gates: Tensor, chosen: ChosenRanks | None, ranks: RankMap) -> Tensor:
    # Summed over ranks in float32: bf16 sums would lose two digits of the router's gradient.
    products = dhg.to(torch.promote_types(dhg.dtype, torch.float32)) * h
    if chosen is not None:
        return chosen.sums(products).to(gates.dtype)
    if gates.shape[0] == 1:
        products = products.sum(0, keepdim=True)
    return ranks.reduce(products).to(gates.dtype)
