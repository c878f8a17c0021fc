"""A variable of the running call, of each thread and task its own, which ``torch.compile`` can read as well.

Its tracer knows no ``ContextVar``. While it traces, a slot is therefore a plain attribute, which the tracer
guards: what is set around a compiled call is seen in it, and another value compiles again.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Slot(Generic[T]):
    """Holds one value, None at first."""

    def __init__(self, name: str) -> None:
        self._variable: ContextVar[T | None] = ContextVar(name, default=None)
        # What the tracer sees: the last value that was set, in whatever thread.
        self._traced: T | None = None

    def get(self) -> T | None:
        """The value of this thread or task."""
        return self._traced if torch.compiler.is_compiling() else self._variable.get()

    def set(self, value: T | None) -> tuple[T | None, Token[T | None] | None]:
        """Put in a value; what comes back takes it out again, by :meth:`reset`."""
        before, self._traced = self._traced, value
        return before, None if torch.compiler.is_compiling() else self._variable.set(value)

    def reset(self, token: tuple[T | None, Token[T | None] | None]) -> None:
        """Put back what was there."""
        self._traced, variable = token
        if variable is not None:
            self._variable.reset(variable)
