"""Training routers with TRL: the only part of the package that imports trl."""

from .checkpoints import last_good_checkpoint
from .recipe_arguments import StrictTrlParser
from .router_trainer import RouterTrainerMixin
from .sft import MoLoraSFTTrainer

__all__ = ["MoLoraSFTTrainer", "RouterTrainerMixin", "StrictTrlParser", "last_good_checkpoint"]
