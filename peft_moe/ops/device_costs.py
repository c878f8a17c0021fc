"""The numbers behind the cost model: what a device does per second, by dtype; they lie in devices.json.

`python benchmarks/calibrate.py` measures a device and writes its entry.
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
    """How a kernel of our own did where it was timed; elsewhere it does not compete.

    Attributes:
        tokens: from this many on.
        trains: whether also with gradients.
        launch: seconds that it costs at least.
        slabs: times that a chosen expert's factors are read, in equivalents.
    """

    tokens: int
    trains: bool
    launch: float
    slabs: float


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
        kernels: Triton forms that were timed and won somewhere, by name.
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
    """The entries of a devices.json, by device and dtype."""
    found = {}
    for device, entry in json.loads(text).items():
        for dtype, numbers in entry.items():
            if dtype != "source":
                kernels = {name: Kernel(**kernel) for name, kernel in numbers.get("kernels", {}).items()}
                found[device, dtype] = Constants(**{**numbers, "kernels": kernels})
    return found


# Read here and not when first asked for: torch.compile could not trace that.
SHIPPED = read_devices(DEVICES.read_text(encoding="utf-8"))


@cache
def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cuda"


def constants_for(device: str, dtype: torch.dtype) -> Constants:
    """The constants of a device type and dtype; of the like, where nobody measured this one.

    Args:
        device: "cpu", "cuda", ….
        dtype: of the products.
    """
    word = str(dtype).removeprefix("torch.")
    # What is compiled chooses among the forms that every device has.
    name = _gpu() if device == "cuda" and not torch.compiler.is_compiling() else device
    for key in ((name, word), (device, word), (device, "float32")):
        if key in SHIPPED:
            return SHIPPED[key]
    return SHIPPED["cpu", "float32"]
