"""All experts as one LoRA whose rank axis is gated: two matrix products, no loop, exact for any gates.

Letters: N tokens, I in, O out, R total rank, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .ranks import RankMap


def mix_stacked(
    x_NI: Tensor, A_RI: Tensor, B_RO: Tensor, gates_NE: Tensor, ranks: RankMap, base_NO: Tensor
) -> Tensor:
    """``base + ((x Aᵀ) ∘ gates per rank) B``; arguments and result as in :func:`mix_reference`.

    The products run in the wider dtype of input and experts, as in PEFT; the sum is taken once, in the
    dtype of ``base_NO``.
    """
    wide = torch.promote_types(x_NI.dtype, A_RI.dtype)
    A_RI, B_RO = A_RI.to(wide), B_RO.to(wide)
    h_NR = functional.linear(x_NI.to(wide), A_RI)
    # Gates are scaled in float32 and rounded once.
    h_NR = h_NR * ranks.expand(gates_NE).to(h_NR.dtype)
    if base_NO.dtype == h_NR.dtype == B_RO.dtype:
        return torch.addmm(base_NO, h_NR, B_RO)
    return base_NO + (h_NR @ B_RO).to(base_NO.dtype)


def folded_delta(A_RI: Tensor, B_RO: Tensor, gates_E: Tensor, ranks: RankMap) -> Tensor:
    """The weight change that constant gates amount to, [O, I], for merging.

    Args:
        A_RI, B_RO: the stacked factors.
        gates_E: one weight per expert, [E].
        ranks: the segments of R.
    """
    gates_R = ranks.expand(gates_E).to(B_RO.dtype)
    return (B_RO * gates_R[:, None]).T @ A_RI
