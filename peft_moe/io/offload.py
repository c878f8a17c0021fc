"""Weights that accelerate keeps on the CPU or on disk between calls, as ``device_map`` asks for.

Whoever calls a module gets them from its hook; who reads a weight from it asks here.
"""

from __future__ import annotations

from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..errors import PeftMoeError


def read(module: nn.Module, name: str = "weight") -> Tensor:
    """A parameter or buffer of a module, fetched if need be.

    Raises:
        PeftMoeError: it was moved to disk, and cannot be found there.
    """
    value: Tensor
    if "_hf_hook" not in module.__dict__:
        value = getattr(module, name)
        return value
    try:
        with align_module_device(module):
            value = getattr(module, name)
    except KeyError as error:
        raise PeftMoeError(
            f"{error.args[0]} was offloaded to disk, where PEFT stores adapters under names that only a "
            "plain LoRA has; give a device_map that keeps layers with experts on a GPU or on the CPU"
        ) from error
    return value


def read_state(module: nn.Module) -> dict[str, Tensor]:
    """``module.state_dict()``, fetched if need be."""
    found = {}
    for name, value in module.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        found[name] = read(module.get_submodule(owner), leaf).detach() if value.is_meta else value
    return found
