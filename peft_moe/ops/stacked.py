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

from .constants import Constants
from .forms import Facts, Operands, add_product, product_dtype
from .ranks import RankMap
from .twice import Gradients, once


class Stacked:
    """Every expert on every token, in two products."""

    name = "stacked"

    def supports(self, facts: Facts) -> str | None:
        """Always."""
        return None

    def cost(self, facts: Facts, constants: Constants) -> float:
        """Two products over all ranks or their traffic, and the gating of every rank."""
        ranks, item = facts.ranks.total, facts.dtype.itemsize
        work = 2 * facts.tokens * ranks * facts.sizes / constants.flops
        # x is read; y is read and written; the factors are read.
        rows = facts.tokens * (facts.in_features + 2 * facts.out_features)
        traffic = (rows + ranks * facts.sizes) * item / constants.bandwidth
        return max(work, traffic) + constants.per_rank * facts.tokens * ranks + constants.launch

    def mix(self, operands: Operands) -> Tensor:
        """``base + ((x Aᵀ) ∘ gates per rank) B``."""
        x_NI, A_RI, B_RO, gates, ranks, base_NO, ids_NK, _, abstains = operands
        if ids_NK is not None:
            gates, ids_NK = gates.expand(len(x_NI), -1), ids_NK.expand(len(x_NI), -1)
        wide = product_dtype(x_NI, A_RI)
        given = (x_NI, A_RI, B_RO, gates)
        # A compiler decides by itself what is kept for the backward pass.
        plain = torch.compiler.is_compiling() or not torch.is_grad_enabled()
        if plain or not any(t.requires_grad for t in given):
            return _forward(*given, base_NO, ids_NK, ranks, wide, abstains)[0]
        out_NO: Tensor = _Stacked.apply(*given, base_NO, ids_NK, ranks, wide, abstains)  # type: ignore[no-untyped-call]
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
    abstains: bool,
) -> tuple[Tensor, Tensor]:
    """The output, and h: [N, R], or [N, K, W] at the chosen experts."""
    h_NR = functional.linear(x_NI.to(wide), A_RI.to(wide)).to(wide)
    if ids_NK is None:
        # Gates are scaled in float32 and rounded once.
        return add_product(base_NO, h_NR * ranks.expand(gates).to(wide), B_RO.to(wide)), h_NR
    h_NKW = take_chosen(h_NR, ids_NK, ranks, abstains)
    hg_NKW = _weigh(h_NKW, ranks.scale_chosen(gates, ids_NK).to(wide))
    hg_NR = put_chosen(hg_NKW, ids_NK, ranks, abstains)
    return add_product(base_NO, hg_NR, B_RO.to(wide)), h_NKW


def take_chosen(values_NR: Tensor, ids_NK: Tensor, ranks: RankMap, abstains: bool) -> Tensor:
    """Ranks of the chosen experts, [N, R] to [N, K, W]; anything where an expert has no such rank."""
    experts, width = len(ranks.ranks), ranks.width
    if ranks.equal:
        # Whole rows move several times faster than elements, here and on the way back.
        ids_NK = ids_NK.clamp_max(experts - 1) if abstains else ids_NK
        rows = _grid_rows(ids_NK, experts)
        return values_NR.view(-1, width).index_select(0, rows).view(*ids_NK.shape, width)
    rows_NKW = ranks.rows(ids_NK.device)[ids_NK]
    return values_NR.gather(1, rows_NKW.clamp_max(ranks.total - 1).flatten(1)).view(rows_NKW.shape)


def put_chosen(values_NKW: Tensor, ids_NK: Tensor, ranks: RankMap, abstains: bool) -> Tensor:
    """Back on the rank axis, [N, R], with zeros at all other experts."""
    tokens, experts, width = len(ids_NK), len(ranks.ranks), ranks.width
    # Behind the last rank there is room for what belongs to no expert, and is cut off.
    if ranks.equal:
        places = experts + abstains
        room = values_NKW.new_zeros(tokens * places, width)
        room.index_copy_(0, _grid_rows(ids_NK, places), values_NKW.reshape(-1, width))
        room_NR = room.view(tokens, -1)
        return room_NR[:, : ranks.total] if abstains else room_NR
    rows_NKW = ranks.rows(ids_NK.device)[ids_NK]
    room_NR = values_NKW.new_zeros(tokens, ranks.total + 1)
    return room_NR.scatter(1, rows_NKW.flatten(1), values_NKW.flatten(1))[:, : ranks.total]


def _grid_rows(ids_NK: Tensor, places: int) -> Tensor:
    """Where the experts of each token stand when the tokens' places lie one behind the other, [N · K]."""
    starts_N = torch.arange(0, len(ids_NK) * places, places, device=ids_NK.device)
    return (ids_NK + starts_N[:, None]).flatten()


def _weigh(values_NKW: Tensor, weights_NK: Tensor) -> Tensor:
    # On CPU a product of equal shapes is several times faster than one that repeats a narrow operand.
    return values_NKW * weights_NK[..., None].expand_as(values_NKW).contiguous()


def chosen_sums(values_NKW: Tensor, ids_NK: Tensor, ranks: RankMap) -> Tensor:
    """Scaled sums over the ranks of each chosen expert, [N, K]; 0 for "no expert"."""
    if ranks.equal:
        sums_NK = values_NKW.sum(-1).masked_fill(ids_NK == len(ranks.ranks), 0.0)
    else:
        rows_NKW = ranks.rows(ids_NK.device)[ids_NK]
        sums_NK = values_NKW.masked_fill(rows_NKW == ranks.total, 0.0).sum(-1)
    return ranks.scale_chosen(sums_NK, ids_NK)


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
        abstains: bool,
    ) -> Tensor:
        with torch.autocast(x_NI.device.type, enabled=False):
            out_NO, h = _forward(x_NI, A_RI, B_RO, gates, base_NO, ids_NK, ranks, wide, abstains)
        for_x, for_A, for_B, for_gates = ctx.needs_input_grad[:4]
        ctx.save_for_backward(
            x_NI if for_A else None,
            A_RI if for_x else None,
            B_RO,
            gates,
            ids_NK,
            h if for_gates or for_B else None,
        )
        ctx.abstains = abstains
        ctx.ranks, ctx.wide, ctx.x_dtype, ctx.A_dtype = ranks, wide, x_NI.dtype, A_RI.dtype
        return out_NO

    @staticmethod
    @once
    def backward(ctx: Any, dy_NO: Tensor) -> Gradients:
        x_NI, A_RI, B_RO, gates, ids_NK, h = ctx.saved_tensors
        ranks, wide = ctx.ranks, ctx.wide
        for_x, for_A, for_B, for_gates, for_base = ctx.needs_input_grad[:5]
        dx_NI = dA_RI = dB_RO = dgates = None
        with torch.autocast(dy_NO.device.type, enabled=False):
            wide_NO = dy_NO.to(wide)
            if for_x or for_A or for_gates:
                dhg = wide_NO @ B_RO.to(wide).T
                if ids_NK is not None:
                    dhg = take_chosen(dhg, ids_NK, ranks, ctx.abstains)
            if for_gates:
                dgates = _gate_gradient(dhg, h, gates, ids_NK, ranks)
            if for_x or for_A:
                dh_NR = _gated(dhg, gates, ids_NK, ranks, ctx.abstains)
                dx_NI = (dh_NR @ A_RI.to(wide)).to(ctx.x_dtype) if for_x else None
                dA_RI = (dh_NR.T @ x_NI.to(wide)).to(ctx.A_dtype) if for_A else None
            if for_B:
                dB_RO = (_gated(h, gates, ids_NK, ranks, ctx.abstains).T @ wide_NO).to(B_RO.dtype)
        return dx_NI, dA_RI, dB_RO, dgates, dy_NO if for_base else None, None, None, None, None


def _gated(values: Tensor, gates: Tensor, ids_NK: Tensor | None, ranks: RankMap, abstains: bool) -> Tensor:
    if ids_NK is None:
        return values * ranks.expand(gates).to(values.dtype)
    hg_NKW = _weigh(values, ranks.scale_chosen(gates, ids_NK).to(values.dtype))
    return put_chosen(hg_NKW, ids_NK, ranks, abstains)


def _gate_gradient(dhg: Tensor, h: Tensor, gates: Tensor, ids_NK: Tensor | None, ranks: RankMap) -> Tensor:
    # Summed over ranks in float32: bf16 sums would lose two digits of the router's gradient.
    products = dhg.to(torch.promote_types(dhg.dtype, torch.float32)) * h
    if ids_NK is not None:
        sums = chosen_sums(products, ids_NK, ranks)
    else:
        if gates.shape[0] == 1:
            products = products.sum(0, keepdim=True)
        sums = ranks.reduce(products)
    return sums.to(gates.dtype)
