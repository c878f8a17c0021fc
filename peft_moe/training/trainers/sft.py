"""TRL's trainer for supervised fine-tuning on a mixture."""

from __future__ import annotations

from trl import SFTTrainer  # type: ignore[attr-defined]  # trl exports it lazily

from .router_mixin import RouterTrainerMixin


class MoLoraSFTTrainer(RouterTrainerMixin, SFTTrainer):  # type: ignore[misc]  # trl is untyped here
    """TRL's ``SFTTrainer`` for mixtures; takes the same arguments.

    Example::

        trainer = MoLoraSFTTrainer(
            "base", args=SFTConfig("out", learning_rate=5e-3, max_steps=200), train_dataset=data,
            peft_config=MoLoraConfig(experts={"math": "…", "code": "…"}, router="context"),
        )
        trainer.train()
    """
