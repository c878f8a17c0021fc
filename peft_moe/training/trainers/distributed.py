"""Numbers that all processes of a run must agree on."""

from __future__ import annotations

from torch import Tensor, distributed


def summed(values: Tensor) -> Tensor:
    """The sum of ``values`` over all processes; the tensor itself where there is only one."""
    if distributed.is_available() and distributed.is_initialized():
        values = values.clone()
        distributed.all_reduce(values)
    return values


def process_count() -> int:
    """How many processes train together."""
    if distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_world_size())
    return 1
