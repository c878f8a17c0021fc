"""Sums and means over the processes of a run, which keep numbers that change between steps equal in all."""

from __future__ import annotations

from torch import Tensor, distributed


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of ``values`` over all processes; a single process gets its own tensor back."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return values
    values = values.clone()
    distributed.all_reduce(values)
    return values


def mean_over_processes(values: Tensor) -> Tensor:
    """Return the mean of ``values`` over all processes; a single process gets its own tensor back."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return values
    return sum_over_processes(values) / distributed.get_world_size()
