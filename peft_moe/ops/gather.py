"""Only the chosen experts are read: their slabs are picked by index, on the device.

For decoding, where the traffic of the weights is the cost; and for one decision for all tokens, which makes
the mixture one LoRA of the chosen experts' ranks.

Letters: N tokens, I in, O out, R total rank, E experts, K chosen experts, W ranks of one expert.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .constants import Constants
from .forms import Facts, Operands, add_product, product_dtype
from .ranks import RankMap


class Gather:
    """The chosen experts' slabs, one set per token, or one for all."""

    name = "gather"

    def supports(self, facts: Facts) -> str | None:
        """A fixed number of chosen experts per token."""
        if facts.chosen is None:
            return "its router keeps no fixed number of experts per token (top_k)"
        return None

    def cost(self, facts: Facts, constants: Constants) -> float:
        """Slabs are read, written and read again; with gradients, the factors' zeros on top."""
        ranks = (facts.chosen or 0) * facts.ranks.width
        sets = 1 if facts.one_row else facts.tokens
        item = facts.dtype.itemsize
        slabs = sets * ranks * facts.sizes * item
        traffic = (1.5 if sets == 1 else 3.0) * slabs / constants.bandwidth
        work = 2 * facts.tokens * ranks * facts.sizes / constants.flops
        if "experts" in facts.trains:
            traffic += 3 * (slabs + facts.ranks.total * facts.sizes * item) / constants.bandwidth
        return work + traffic + constants.launch * (1.0 if sets == 1 else 2.0)

    def mix(self, operands: Operands) -> Tensor:
        """``base + ((x A_chosenᵀ) ∘ gates) B_chosen``."""
        x_NI, A_RI, B_RO, _, ranks, base_NO, ids_SK, weights_SK = operands
        assert ids_SK is not None  # supports() has seen to it
        assert weights_SK is not None
        wide = product_dtype(x_NI, A_RI)
        experts = len(ranks.ranks)
        sets, chosen = ids_SK.shape
        if ranks.equal:
            ids = ids_SK.clamp_max(experts - 1).view(-1)
            A_SKI, B_SKO = (_grid(t, ranks).index_select(0, ids).to(wide) for t in (A_RI, B_RO))
            absent = (ids_SK == experts)[..., None]
        else:
            rows_SKW = ranks.rows(ids_SK.device)[ids_SK]
            absent = rows_SKW == ranks.total
            rows = rows_SKW.clamp_max(ranks.total - 1).view(-1)
            A_SKI, B_SKO = (t.index_select(0, rows).to(wide) for t in (A_RI, B_RO))
        weights_SK1 = ranks.scale_chosen(weights_SK, ids_SK).to(wide)[..., None]
        x_NI = x_NI.to(wide)
        if sets == 1:
            h_NKW = functional.linear(x_NI, A_SKI.reshape(-1, A_RI.shape[1])).view(len(x_NI), chosen, -1)
            hg_NR = (h_NKW * weights_SK1).masked_fill(absent, 0.0).flatten(1)
            return add_product(base_NO, hg_NR, B_SKO.reshape(-1, B_RO.shape[1]))
        h_NR1 = torch.bmm(A_SKI.reshape(sets, -1, A_RI.shape[1]), x_NI[..., None])
        h_NKW = h_NR1.view(sets, chosen, -1)
        hg_N1R = (h_NKW * weights_SK1).masked_fill(absent, 0.0).view(sets, 1, -1)
        delta_NO = torch.bmm(hg_N1R, B_SKO.reshape(sets, -1, B_RO.shape[1]))[:, 0]
        return base_NO + delta_NO.to(base_NO.dtype)


def _grid(factor_RX: Tensor, ranks: RankMap) -> Tensor:
    """One row per expert, [E, W·X]: rows are picked several times faster than ranks."""
    return factor_RX.reshape(len(ranks.ranks), -1)
