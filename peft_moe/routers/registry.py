"""The catalogue of scorers. A new router is one class with one method, and one decorator."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeVar

from torch import Tensor, nn

from ..errors import PeftMoeError, near_matches
from .presets import PRESETS
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
        PeftMoeError: the name is no text or taken by another class, or the class is no Scorer.
    """

    def add(cls: ScorerT) -> ScorerT:
        if not isinstance(name, str) or not name:
            raise PeftMoeError(f"router name {name!r} must be non-empty text, as in register_router('mine')")
        if not (isinstance(cls, type) and issubclass(cls, Scorer)):
            raise PeftMoeError(f"router {name!r}: {cls!r} is not a Scorer; derive it from peft_moe.Scorer")
        taken = _SCORERS.get(name)
        # The same class may come again: a module that is reloaded, a notebook cell that is run twice.
        if taken is not None and _origin(taken) != _origin(cls):
            raise PeftMoeError(f"router name {name!r} is taken by {_origin(taken)}; choose another")
        # A preset would silently win over the class.
        if PRESETS.get(name, {}).get("scorer", name) != name:
            raise PeftMoeError(f"router name {name!r} is taken by a preset; choose another")
        _SCORERS[name] = cls
        return cls

    return add


def _origin(cls: type[Scorer]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def scorer_class(name: str) -> type[Scorer]:
    """The scorer registered as ``name``.

    Raises:
        PeftMoeError: there is none; names near matches.
    """
    if name not in _SCORERS:
        raise PeftMoeError(f"router={name!r} is not known.{near_matches(name, _SCORERS)}")
    return _SCORERS[name]


def available_scorers() -> list[str]:
    """Names of all registered scorers, sorted."""
    return sorted(_SCORERS)
