"""What the Triton kernels share: index tables of the rank axis, tile sizes, precision of a product.

Imported only where Triton is installed; :mod:`peft_moe.ops.triton.backends` checks that first.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import interpreted

# Tensor cores take no smaller tile.
MIN_TILE = 16


@dataclass(frozen=True)
class Tiles:
    """How one launch is cut up: rows and columns of a program's tile, depth of a step, warps, stages."""

    rows: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 3

    @property
    def launch(self) -> dict[str, Any]:
        """Triton's own launch options."""
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class RankTables:
    """A rank map on the device. Group E, of rank 0 and scaling 0, stands for "no expert".

    Attributes:
        starts: first rank of every group and one past the last, int32 [E + 2].
        owners: the expert of every rank, int32 [R].
        scaling: float32 [E + 1].
        experts: E.
        widest: the largest rank.
    """

    starts: Tensor
    owners: Tensor
    scaling: Tensor
    experts: int
    widest: int

    @property
    def tile(self) -> int:
        """Ranks that a program holds for one expert."""
        return max(MIN_TILE, triton.next_power_of_2(self.widest))


# Made once per device: a copy from the host would stop a CUDA graph. Layers mostly share their ranks.
@lru_cache(maxsize=4096)
def rank_tables(ranks: tuple[int, ...], scaling: tuple[float, ...], device: torch.device) -> RankTables:
    """The tables of ``RankMap(ranks, scaling)`` on ``device``."""
    starts = [sum(ranks[:e]) for e in range(len(ranks) + 1)]
    owners = [e for e, rank in enumerate(ranks) for _ in range(rank)]
    # Made under torch.inference_mode() they could never be used in training afterwards.
    with torch.inference_mode(False):
        return RankTables(
            starts=torch.tensor([*starts, starts[-1]], dtype=torch.int32, device=device),
            owners=torch.tensor(owners, dtype=torch.int32, device=device),
            scaling=torch.tensor([*scaling, 0.0], dtype=torch.float32, device=device),
            experts=len(ranks),
            widest=max(ranks),
        )


def rows_of(tensor: Tensor) -> Tensor:
    """The same values with each row in one piece, which is what the kernels read."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def precision(dtype: torch.dtype) -> str:
    """How products are taken: float32 as torch takes them."""
    if dtype == torch.bfloat16 and interpreted():
        return "widen"
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else "ieee"


@triton.jit
def product(one, other, sums, PRECISION: tl.constexpr):
    """``sums + one @ other``, in float32."""
    if PRECISION == "widen":
        # The interpreter would multiply the bits of bf16 as integers.
        sums = tl.dot(one.to(tl.float32), other.to(tl.float32), sums, input_precision="ieee")
    else:
        sums = tl.dot(one, other, sums, input_precision=PRECISION)
    return sums
