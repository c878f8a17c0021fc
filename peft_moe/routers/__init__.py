"""Routers: scorers read an input, the selector turns scores into gates, presets name known methods."""

from . import called as _called  # these register the built-in scorers
from . import constant as _constant
from . import learned as _learned
from . import prototypes as _prototypes
from .base import Router
from .presets import PRESETS, RECOMMENDED, Preset
from .registry import Scorer, available_scorers, register_router, scorer_class
from .selectors import SCORING_FUNCS, select
from .settings import RouterSettings

del _called, _constant, _learned, _prototypes

__all__ = [
    "PRESETS",
    "RECOMMENDED",
    "SCORING_FUNCS",
    "Preset",
    "Router",
    "RouterSettings",
    "Scorer",
    "available_scorers",
    "register_router",
    "scorer_class",
    "select",
]
