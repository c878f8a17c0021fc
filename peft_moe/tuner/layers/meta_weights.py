"""Weights without memory: where ``low_cpu_mem_usage`` makes them, and where it must not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

# Taken at import, before anybody patches it.
_register_parameter = nn.Module.register_parameter


def is_empty(module: nn.Module) -> bool:
    """Whether a parameter of ``module`` still waits for its values."""
    return any(p.device.type == "meta" for p in module.parameters())


@contextmanager
def real_weights() -> Iterator[None]:
    """Make parameters as usual within PEFT's and accelerate's ``init_empty_weights``.

    ``low_cpu_mem_usage=True`` empties all that is made, for a loader to fill. Experts that were read from
    their adapters, and fresh weights, are filled by nobody.
    """
    patched = nn.Module.register_parameter
    nn.Module.register_parameter = _register_parameter  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = patched  # type: ignore[method-assign]
