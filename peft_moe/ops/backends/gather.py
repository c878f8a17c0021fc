"""Copies of the chosen experts' slabs (their rows of A and B), selected by index on the device.

This suits decoding, where reading the weights is the cost. It also suits one decision for all tokens, which
makes the mixture a single LoRA of the chosen experts' ranks.

Letters: N tokens, S sets of slabs (N or 1), I in, O out, R total rank, E experts, K chosen experts, W ranks
of one expert.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..backend import NEVER_CHEAPEST, NO_TOP_K, CallSpec, MixInputs, product_dtype
from ..device_costs import Constants
from ..mix import add, add_product
from ..rank_map import RankMap

# On a CPU, a product in bf16 or fp16 takes some ten microseconds before it starts, one in float32 about one.
# Products with fewer FLOPs than this run in float32.
_FEW_FLOPS = 2e6
_NARROW = (torch.bfloat16, torch.float16)
# Copies of slabs larger than this many times the factors take too much memory, however fast they are.
_MAX_COPIES = 2


class Gather:
    """The chosen experts' slabs, one set per token or one set for all."""

    name = "gather"

    def supports(self, spec: CallSpec) -> str | None:
        """Refuse calls without a fixed number of chosen experts per token."""
        if spec.chosen is None:
            return NO_TOP_K
        return None

    def cost(self, spec: CallSpec, constants: Constants) -> float:
        """Count slabs that are read, written and read again; with gradients also the factors' gradients."""
        ranks = (spec.chosen or 0) * spec.ranks.width
        sets = 1 if spec.one_row else spec.tokens
        item = spec.dtype.itemsize
        if sets > 1 and sets * ranks > _MAX_COPIES * spec.ranks.total:
            return NEVER_CHEAPEST
        slabs = sets * ranks * spec.sizes * item
        traffic = (1.5 if sets == 1 else 3.0) * slabs / constants.bandwidth
        work = 2 * spec.tokens * ranks * spec.sizes / constants.flops
        if "experts" in spec.trains:
            traffic += 3 * (slabs + spec.ranks.total * spec.sizes * item) / constants.bandwidth
        return work + traffic + constants.launch * (1.0 if sets == 1 else 2.0)

    def mix(self, inputs: MixInputs) -> Tensor:
        """Return ``base + ((x A_chosenᵀ) ∘ gates) B_chosen``."""
        x_NI, A_RI, B_RO, weights_SK, ranks, base_NO, ids_SK, _, may_select_null, overwrite, fp32_NI, _ = (
            inputs
        )
        assert ids_SK is not None, "supports() refuses dense gates"
        (sets, chosen), (tokens, width), out = ids_SK.shape, x_NI.shape, B_RO.shape[1]
        dtype = inputs.dtype or product_dtype(x_NI, A_RI)
        if dtype in _NARROW and x_NI.is_cpu:
            work = 2 * tokens * chosen * ranks.width * (width + out)
            dtype = torch.float32 if work < _FEW_FLOPS else dtype
        A_SRI, B_SRO, absent = _slabs(A_RI, B_RO, ids_SK, ranks, may_select_null)
        x_NI = fp32_NI if dtype == torch.float32 and fp32_NI is not None else x_NI.to(dtype)
        A_SRI, B_SRO = A_SRI.to(dtype), B_SRO.to(dtype)
        # A scaling that all experts share is applied in the sum, where it costs nothing.
        scaling = ranks.one_scaling
        if scaling is None:
            scaling, weights_SK = 1.0, ranks.scale_chosen(weights_SK, ids_SK)
        weights_SK1 = weights_SK.view(sets, chosen, 1)
        if weights_SK1.dtype != dtype:
            weights_SK1 = weights_SK1.to(dtype)
        if sets == 1:
            h_NR = functional.linear(x_NI, A_SRI.view(-1, width))
        else:
            h_NR = torch.bmm(A_SRI.view(sets, -1, width), x_NI[..., None])
        hg_NR = _gated(h_NR.view(tokens, chosen, -1), weights_SK1, absent, h_NR)
        if sets == 1:
            return add_product(base_NO, hg_NR, B_SRO.view(-1, out), overwrite, scaling)
        delta_N1O = torch.bmm(hg_NR.view(sets, 1, -1), B_SRO.view(sets, -1, out))
        return add(base_NO, delta_N1O[:, 0], overwrite, scaling)


def _gated(h_NKW: Tensor, weights_SK1: Tensor, absent: Tensor | None, h_NR: Tensor) -> Tensor:
    """Multiply each rank by its expert's weight, 0 where ``absent``; ``h_NR`` is a view of ``h_NKW``."""
    if torch.is_grad_enabled():
        hg_NKW = h_NKW * weights_SK1
        hg_NKW = hg_NKW if absent is None else hg_NKW.masked_fill(absent, 0.0)
        return hg_NKW.view(h_NR.shape)
    # In place: a decode step then allocates nothing here, not even a view.
    h_NKW.mul_(weights_SK1)
    if absent is not None:
        h_NKW.masked_fill_(absent, 0.0)
    return h_NR


def _slabs(
    A_RI: Tensor, B_RO: Tensor, ids_SK: Tensor, ranks: RankMap, may_select_null: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the chosen rows of both factors, and a mask of the entries [S, K, W] that have no rank."""
    if ranks.equal:
        # One row per expert: whole experts are selected several times faster than single ranks.
        experts, ids = len(ranks.ranks), ids_SK.reshape(-1)
        absent = None
        if may_select_null:
            absent = (ids_SK == experts).unsqueeze(-1)
            ids = ids.clamp_max(experts - 1)
        A_EX, B_EX = A_RI.reshape(experts, -1), B_RO.reshape(experts, -1)
        return A_EX.index_select(0, ids), B_EX.index_select(0, ids), absent
    rows_SKW = ranks.rows(ids_SK.device)[ids_SK]
    rows = rows_SKW.clamp_max(ranks.total - 1).view(-1)
    return A_RI.index_select(0, rows), B_RO.index_select(0, rows), rows_SKW == ranks.total
