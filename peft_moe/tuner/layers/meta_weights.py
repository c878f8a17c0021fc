"""Weights on "meta", without memory: who has them, and where they must not be made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

# Read at import, before any library patches it.
_register_parameter = nn.Module.register_parameter


def is_empty(module: nn.Module) -> bool:
    """Whether a parameter of ``module`` has no memory yet."""
    return any(p.device.type == "meta" for p in module.parameters())


@contextmanager
def real_weights() -> Iterator[None]:
    """Make parameters with memory inside PEFT's and accelerate's ``init_empty_weights``.

    ``low_cpu_mem_usage=True`` makes all parameters empty, and a loader fills them. No loader fills experts
    that were read from their adapters, nor fresh weights.
    """
    patched = nn.Module.register_parameter
    nn.Module.register_parameter = _register_parameter  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = patched  # type: ignore[method-assign]
