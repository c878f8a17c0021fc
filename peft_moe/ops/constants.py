"""The numbers behind the cost model: what a device of one kind does per second, by dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Constants:
    """Measured in layers that run, not in isolated products, which promise twice what comes of it.

    Attributes:
        flops: floating point operations per second of a large product.
        bandwidth: bytes per second of memory traffic.
        weight_bandwidth: bytes per second at which a small product streams its weights.
        passes: times that a gathered or scattered row goes through memory, in equivalents.
        per_rank: seconds for gating one rank of one token in the stacked form.
        launch: seconds that any form costs at least.
        segment: seconds that one expert's tokens cost beside their work.
        sort: seconds for bringing tokens into the order of their experts.
    """

    flops: float
    bandwidth: float
    weight_bandwidth: float
    passes: float
    per_rank: float
    launch: float
    segment: float
    sort: float


# From the layer grid on a Zen 5 core, one thread: 1024x1024, 512 tokens; held out on three other shapes.
_CPU_BF16 = Constants(420e9, 34.6e9, 6.4e9, 6.0, 0.80e-9, 20e-6, 27.5e-6, 60e-6)
_CPU_FP32 = Constants(94e9, 34.6e9, 6.4e9, 6.0, 0.80e-9, 20e-6, 27.5e-6, 60e-6)
# Roofline estimates for an H100; not measured.
_CUDA_16 = Constants(798e12, 3.0e12, 3.0e12, 3.5, 1.4e-15, 15e-6, 5e-6, 60e-6)
_CUDA_32 = Constants(400e12, 3.0e12, 3.0e12, 3.5, 2.8e-15, 15e-6, 5e-6, 60e-6)

SHIPPED: dict[tuple[str, torch.dtype], Constants] = {
    ("cpu", torch.bfloat16): _CPU_BF16,
    ("cpu", torch.float16): _CPU_FP32,
    ("cpu", torch.float32): _CPU_FP32,
    ("cuda", torch.bfloat16): _CUDA_16,
    ("cuda", torch.float16): _CUDA_16,
    ("cuda", torch.float32): _CUDA_32,
}


def constants_for(device: str, dtype: torch.dtype) -> Constants:
    """The constants of a device type and dtype; of its float32 where the dtype is not listed."""
    return SHIPPED.get((device, dtype)) or SHIPPED.get((device, torch.float32)) or _CPU_FP32
