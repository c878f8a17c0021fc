"""A model as it was: its modules, hooks and what trains, put back if an injection or a load fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class Snapshot:
    """How the modules of a model hang together, without a copy of any tensor.

    Args:
        model: to be looked at; it must not be copied while this is held, and a copy of it has none.
    """

    def __init__(self, model: nn.Module | None) -> None:
        modules = [] if model is None else list(model.modules())
        # Handles of hooks know their dict by identity: containers are put back in place.
        self._states = [(m, dict(m.__dict__), _contents(m)) for m in modules]
        parameters = [] if model is None else list(model.parameters())
        self._trains = [(p, p.requires_grad) for p in parameters]

    def restore(self) -> None:
        """Put everything back; the values of tensors are left alone."""
        for module, attributes, contents in self._states:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for container, inside in contents:
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(inside)
        for parameter, trains in self._trains:
            if parameter.requires_grad != trains:
                parameter.requires_grad_(trains)

    def __reduce__(self) -> Any:
        return Snapshot, (None,)  # also for deepcopy


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    held = (v for v in module.__dict__.values() if isinstance(v, dict | list | set))
    return [(container, type(container)(container)) for container in held]


@contextmanager
def untouched_on_failure(model: nn.Module) -> Iterator[None]:
    """Whatever the block raises, ``model`` is then as it was before it."""
    before = Snapshot(model)
    try:
        yield
    except BaseException:
        before.restore()
        raise
