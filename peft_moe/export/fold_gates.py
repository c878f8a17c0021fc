"""Constant gates folded into one LoRA, exactly or cut to a rank.

Letters: I in, O out, R total rank, E experts, K ranks that are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import RankMap


def scaled_ranks(gates_E: Tensor, ranks: RankMap) -> Tensor:
    """What every rank of B is multiplied by, [R]: gate times scaling, as a forward pass computes it."""
    return ranks.expand(gates_E)


def fold(A_RI: Tensor, B_RO: Tensor, scales_R: Tensor, shared: float | None) -> tuple[Tensor, Tensor]:
    """Factors of one plain LoRA; ranks of scale 0 are left out.

    Args:
        A_RI, B_RO: the experts' factors on one rank axis.
        scales_R: from :func:`scaled_ranks`.
        shared: the one scale of all kept ranks, which the LoRA's alpha then holds; None multiplies into B.

    Returns:
        A [K, I] as it was and B [O, K]; B in the experts' dtype where that holds it exactly, else at least in
        float32.
    """
    kept_R = scales_R != 0
    A_KI, B_KO, scales_K = A_RI[kept_R], B_RO[kept_R], scales_R[kept_R]
    if shared is None:
        wide = torch.promote_types(B_KO.dtype, torch.float32)
        wide_KO = B_KO.to(wide) * scales_K.to(wide)[:, None]
        narrow_KO = wide_KO.to(B_KO.dtype)
        B_KO = narrow_KO if torch.equal(narrow_KO.to(wide), wide_KO) else wide_KO
    return A_KI, B_KO.T


def cut(A_KI: Tensor, B_OK: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors of ``rank`` ranks, by SVD of B·A without ever making it; its square root on each side.

    Args:
        A_KI, B_OK: factors of a product.
        rank: how many singular values are kept; all of them if there are no more.

    Returns:
        A [rank, I] and B [O, rank], float64.
    """
    A_KI, B_OK = A_KI.double(), B_OK.double()
    left_OK, left_KK = torch.linalg.qr(B_OK)
    right_IK, right_KK = torch.linalg.qr(A_KI.T)
    u_KK, s_K, v_KK = torch.linalg.svd(left_KK @ right_KK.T)
    root_K = s_K[:rank].sqrt()
    return root_K[:, None] * (v_KK[:rank] @ right_IK.T), (left_OK @ u_KK[:, :rank]) * root_K


def product_norm(A_KI: Tensor, B_OK: Tensor) -> float:
    """‖B·A‖ (Frobenius) in float64, from the factors' Gram matrices."""
    A_KI, B_OK = A_KI.double(), B_OK.double()
    square = ((B_OK.T @ B_OK) * (A_KI @ A_KI.T)).sum()
    return float(square.clamp_min(0).sqrt())


def distance(A_KI: Tensor, B_OK: Tensor, other_A: Tensor, other_B: Tensor) -> float:
    """‖B·A − B'·A'‖ in float64; what lies below 1e-8 of either is rounding."""
    A = torch.cat([A_KI.double(), other_A.double()])
    return product_norm(A, torch.cat([B_OK.double(), -other_B.double()], dim=1))
