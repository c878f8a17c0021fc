"""Children of a module that every token's forward pass looks up."""

from __future__ import annotations

from torch import nn


def cache_submodules(module: nn.Module, *names: str) -> None:
    """Make children available as plain attributes as well.

    The lookup of a child in ``nn.Module`` costs half a microsecond. Assigning a new child removes this cache
    entry; the normal lookup then applies.

    Args:
        module: the parent.
        names: names of its children.
    """
    for name in names:
        module.__dict__[name] = module._modules[name]
