"""Training routers with TRL: the only part of the package that imports trl."""

from .checkpoints import last_good_checkpoint
from .grpo import MoLoraGRPOTrainer
from .preference import MoLoraDPOTrainer, MoLoraKTOTrainer, MoLoraRewardTrainer
from .recipe_arguments import StrictTrlParser
from .router_trainer import RouterTrainerMixin
from .sft import MoLoraSFTTrainer

__all__ = [
    "MoLoraDPOTrainer",
    "MoLoraGRPOTrainer",
    "MoLoraKTOTrainer",
    "MoLoraRewardTrainer",
    "MoLoraSFTTrainer",
    "RouterTrainerMixin",
    "StrictTrlParser",
    "last_good_checkpoint",
]
