"""The constants of the cost model, by device and dtype, read from devices.json.

Each backend predicts its seconds from them: FLOPs over ``flops``, bytes over ``bandwidth``, plus fixed costs
per launch, per expert and per sort. They are fitted to layers that run, because isolated products are up to
twice as fast as the same products between other layers. ``python benchmarks/calibrate.py`` measures a device
and writes its entry.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

DEVICES = Path(__file__).with_name("devices.json")


@dataclass(frozen=True)
class Kernel:
    """Constants of a Triton kernel, and the calls at which it was timed; at others it is never the cheapest.

    Attributes:
        tokens: the smallest number of tokens.
        trains: whether it was also timed with gradients.
        launch: seconds that a call takes at least.
        slabs: how often it reads the factors of a chosen expert, as an effective number.
    """

    tokens: int
    trains: bool
    launch: float
    slabs: float


@dataclass(frozen=True)
class Constants:
    """Constants of one device and dtype.

    Attributes:
        flops: floating point operations per second of a large product.
        bandwidth: bytes per second of memory traffic.
        weight_bandwidth: bytes per second at which a small product streams its weights.
        passes: how often a gathered or scattered row moves through memory, as an effective number.
        per_rank: seconds to gate one rank of one token in the stacked backend.
        launch: seconds that a call of any backend takes at least.
        segment: seconds that a group of one expert's tokens takes beyond its FLOPs and bytes.
        sort: seconds to sort the tokens by expert.
        kernels: Triton backends that were timed and were the fastest somewhere, by name.
    """

    flops: float
    bandwidth: float
    weight_bandwidth: float
    passes: float
    per_rank: float
    launch: float
    segment: float
    sort: float
    kernels: Mapping[str, Kernel] = field(default_factory=dict)


def read_devices(text: str) -> dict[tuple[str, str], Constants]:
    """Parse a devices.json into constants by device and dtype."""
    constants = {}
    for device, entry in json.loads(text).items():
        for dtype, numbers in entry.items():
            if dtype != "source":
                kernels = {name: Kernel(**kernel) for name, kernel in numbers.get("kernels", {}).items()}
                constants[device, dtype] = Constants(**{**numbers, "kernels": kernels})
    return constants


# Read at import: torch.compile cannot trace the reading of a file.
SHIPPED = read_devices(DEVICES.read_text(encoding="utf-8"))


@cache
def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cuda"


def constants_for(device: str, dtype: torch.dtype) -> Constants:
    """Return the constants of a device type and dtype, or of the most similar ones that were measured.

    Args:
        device: "cpu", "cuda", ….
        dtype: dtype of the products.
    """
    dtype_name = str(dtype).removeprefix("torch.")
    # Under torch.compile only torch's backends compete; for them the constants of the device type suffice.
    device_name = _gpu() if device == "cuda" and not torch.compiler.is_compiling() else device
    for key in ((device_name, dtype_name), (device, dtype_name), (device, "float32")):
        if key in SHIPPED:
            return SHIPPED[key]
    return SHIPPED["cpu", "float32"]
