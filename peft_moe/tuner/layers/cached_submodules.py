"""Children of a module that are asked for in every token."""

from __future__ import annotations

from torch import nn


def cache_submodules(module: nn.Module, *names: str) -> None:
    """Have children found as plain attributes as well.

    ``nn.Module`` finds them by a search that costs half a microsecond. Who assigns another child ends this,
    and it is found by the search again.
    """
    for name in names:
        module.__dict__[name] = module._modules[name]
