"""The catalogue of scorers. A new router is one class with one method, and one decorator."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeVar

from torch import Tensor, nn

from ..errors import PeftMoeError, near_matches
from .settings import RouterSettings


class Scorer(nn.Module):
    """Turns a router's input into one score per column. Subclasses write :meth:`forward`.

    Attributes:
        reads_input: False if the scores are the same for every token; such a mixture can be merged.
        trainable: False keeps the scorer's weights frozen through everything that PEFT does.
        paper: where the method comes from.
    """

    reads_input: ClassVar[bool] = True
    trainable: ClassVar[bool] = True
    paper: ClassVar[str] = ""

    def __init__(self, settings: RouterSettings, in_features: int) -> None:
        """Args: the router's settings, and I, the width of its input."""
        super().__init__()
        self.settings = settings
        self.in_features = in_features

    def forward(self, x: Tensor) -> Tensor:
        """Scores.

        Args:
            x: [B, T, I] (or [B, S, I] of pooled prompts), float32 or wider.

        Returns:
            [B, T, X], or [1, 1, X] if :attr:`reads_input` is False, in the dtype of ``x``.
        """
        raise NotImplementedError


_SCORERS: dict[str, type[Scorer]] = {}
ScorerT = TypeVar("ScorerT", bound=type[Scorer])


def register_router(name: str) -> Callable[[ScorerT], ScorerT]:
    """Class decorator: make a :class:`Scorer` available as ``MoLoraConfig(router=name)``.

    Raises:
        PeftMoeError: the name is taken by another class.
    """

    def add(cls: ScorerT) -> ScorerT:
        taken = _SCORERS.get(name)
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            raise PeftMoeError(f"router name {name!r} is taken by {taken.__qualname__}; choose another")
        _SCORERS[name] = cls
        return cls

    return add


def scorer_class(name: str) -> type[Scorer]:
    """The scorer registered as ``name``.

    Raises:
        PeftMoeError: there is none; names near matches.
    """
    if name not in _SCORERS:
        raise PeftMoeError(f"router_scorer={name!r} is not known.{near_matches(name, _SCORERS)}")
    return _SCORERS[name]


def available_scorers() -> list[str]:
    """Names of all registered scorers, sorted."""
    return sorted(_SCORERS)
