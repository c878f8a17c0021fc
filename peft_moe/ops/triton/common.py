"""Shared parts of the Triton kernels: index tables of the rank axis, tile sizes, precision of a product.

Imported only where Triton is installed; :mod:`peft_moe.ops.triton.kernel_backends` checks that first.
"""

# Triton's decorators are untyped, and a kernel's arguments are pointers without a Python type.
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

# The smallest tile of the tensor cores.
MIN_TILE = 16


@dataclass(frozen=True)
class Tiles:
    """Sizes of one launch: rows and columns of a program's tile, depth of a step, warps, stages."""

    rows: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 3

    @property
    def launch(self) -> dict[str, Any]:
        """Return Triton's launch options."""
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class RankTables:
    """A rank map on the device. Group E, with rank 0 and scaling 0, stands for "no expert".

    Attributes:
        starts: first rank of each group and one past the last, int32 [E + 2].
        owners: the expert of each rank, int32 [R].
        scaling: scaling of each group, float32 [E + 1].
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
        """Return the number of ranks that a program holds for one expert."""
        return max(MIN_TILE, triton.next_power_of_2(self.widest))


# Made once per device, because a copy from the host would stop a CUDA graph. Layers mostly share their ranks.
@lru_cache(maxsize=4096)
def rank_tables(ranks: tuple[int, ...], scaling: tuple[float, ...], device: torch.device) -> RankTables:
    """Return the tables of ``RankMap(ranks, scaling)`` on ``device``."""
    starts = [sum(ranks[:e]) for e in range(len(ranks) + 1)]
    owners = [e for e, rank in enumerate(ranks) for _ in range(rank)]
    # Training cannot use a tensor that was made under torch.inference_mode().
    with torch.inference_mode(False):
        return RankTables(
            starts=torch.tensor([*starts, starts[-1]], dtype=torch.int32, device=device),
            owners=torch.tensor(owners, dtype=torch.int32, device=device),
            scaling=torch.tensor([*scaling, 0.0], dtype=torch.float32, device=device),
            experts=len(ranks),
            widest=max(ranks),
        )


def rows_of(tensor: Tensor) -> Tensor:
    """Return a tensor whose rows are contiguous, as the kernels need them; copy only if necessary."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def precision(dtype: torch.dtype) -> str:
    """Return the precision of products; in float32 torch's own setting decides."""
    if dtype == torch.bfloat16 and interpreted():
        return "fp32"
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else "ieee"


@triton.jit
def product(left, right, sums, PRECISION: tl.constexpr):
    """Return ``sums + left @ right`` in float32."""
    if PRECISION == "fp32":
        # The interpreter would multiply the bits of bf16 as integers.
        sums = tl.dot(left.to(tl.float32), right.to(tl.float32), sums, input_precision="ieee")
    else:
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    return sums
