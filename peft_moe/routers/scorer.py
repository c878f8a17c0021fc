"""The catalogue of scorers. A new router is one class with one method, and one decorator."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeVar

from torch import Tensor, nn

from ..errors import PeftMoeError, near_matches
from ..routing.context import RoutingContext
from .presets import PRESETS
from .settings import RouterSettings


class Scorer(nn.Module):
    """Turns a router's input into one score per column. Subclasses write :meth:`forward`.

    Attributes:
        reads_input: False if the scores are the same for every token; such a mixture can be merged.
        reads_hidden: False if the scores depend on the call alone (its labels, its token ids), so that no
            hidden state needs to be known; such a scorer overrides :meth:`score`.
        reads_experts: True if the scores are made from the experts' own weights; such a scorer overrides
            :meth:`read_experts`, and serves scope "module" only.
        hidden_layer: True if the scorer makes use of the setting ``hidden_size``.
        draws: True if the scores are drawn anew in every call, also outside of training.
        trainable: False keeps the scorer's weights frozen through everything that PEFT does.
        paper: where the method comes from.
    """

    reads_input: ClassVar[bool] = True
    reads_hidden: ClassVar[bool] = True
    reads_experts: ClassVar[bool] = False
    hidden_layer: ClassVar[bool] = False
    draws: ClassVar[bool] = False
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

    def score(self, x: Tensor, context: RoutingContext | None) -> Tensor:
        """Scores of a call; what only looks at ``x`` writes :meth:`forward` and leaves this alone.

        Args:
            x: as in :meth:`forward`.
            context: the running forward pass: its token ids, labels and mask; None outside of a model.

        Raises:
            PeftMoeError: the call does not say what the scorer needs to know.
        """
        scores: Tensor = self(x)
        return scores

    @property
    def is_linear(self) -> bool:
        """Whether the scores are ``linear(x, self.weight)``, plus ``self.bias`` if there is one, alone."""
        return False

    def expect_experts(self, ranks: tuple[int, ...]) -> None:
        """Make room for what :meth:`read_experts` keeps, where its size depends on the experts.

        Comes before it, and before weights are loaded.

        Args:
            ranks: r_e of every expert in the scorer's layer.
        """

    def read_experts(
        self, A_RI: Tensor, B_RO: Tensor, ranks: tuple[int, ...], scaling: tuple[float, ...]
    ) -> None:
        """Take what the scorer needs from the experts of its layer, once, when they are put there.

        Args:
            A_RI, B_RO: all factors on one rank axis, expert after expert.
            ranks: r_e of every expert; 0 for one that does not adapt this layer.
            scaling: what B·A of every expert is multiplied by.
        """


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
        if name in PRESETS and PRESETS[name].fields["scorer"] != name:
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
