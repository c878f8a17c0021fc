"""Routers: scorers read an input, the selector turns scores into gates, presets name known methods."""

from . import scorers as _scorers  # registers the built-in scorers
from .base import Router
from .presets import PRESETS
from .registry import Scorer, available_scorers, register_router, scorer_class
from .selectors import SCORING_FUNCS, select
from .settings import RouterSettings

del _scorers

__all__ = [
    "PRESETS",
    "SCORING_FUNCS",
    "Router",
    "RouterSettings",
    "Scorer",
    "available_scorers",
    "register_router",
    "scorer_class",
    "select",
]
