"""Training routers with TRL: the only part of the package that imports trl."""

from .recipe_arguments import StrictTrlParser
from .trainers.checkpoints import last_good_checkpoint
from .trainers.grpo import MoLoraGRPOTrainer
from .trainers.preference import MoLoraDPOTrainer, MoLoraKTOTrainer, MoLoraRewardTrainer
from .trainers.router_mixin import RouterTrainerMixin
from .trainers.sft import MoLoraSFTTrainer

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
