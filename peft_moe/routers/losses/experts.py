"""A loss on the experts' own weights. Letters: R total rank, I in."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def orthogonality_loss(A_RI: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """Mean squared cosine between the rows of A of different experts: 0 to 1 (as in arXiv 2310.14152).

    Args:
        A_RI: the experts' A factors on one rank axis.
        ranks: of each expert, in that order; 0 for one that is absent.

    Returns:
        A scalar; zero where fewer than two experts are present.
    """
    owners = [expert for expert, rank in enumerate(ranks) for _ in range(rank)]
    owner_R = torch.tensor(owners, device=A_RI.device)
    others_RR = owner_R[:, None] != owner_R[None, :]
    unit_RI = functional.normalize(A_RI.to(torch.promote_types(A_RI.dtype, torch.float32)), dim=-1)
    squares_RR = (unit_RI @ unit_RI.T).square() * others_RR
    return squares_RR.sum() / others_RR.sum().clamp_min(1)
