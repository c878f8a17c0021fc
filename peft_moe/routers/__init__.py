"""Routers: scorers read an input, the selector turns scores into gates, presets name known methods."""

from .losses import register_loss
from .presets import PRESETS, RECOMMENDED, Preset
from .router import Router
from .scorer import Scorer, available_scorers, register_router, scorer_class
from .scorers import batch_info as _called  # these register the built-in scorers
from .scorers import constant as _constant
from .scorers import learned as _learned
from .scorers import prototypes as _prototypes
from .selection import SCORING_FUNCS, select
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
    "register_loss",
    "register_router",
    "scorer_class",
    "select",
]
