"""Preferences: TRL's DPO and KTO with the right reference, and reward models on a mixture."""

from __future__ import annotations

from typing import Any

from trl import DPOTrainer, KTOTrainer, RewardTrainer

from ...errors import PeftMoeError
from .reference_mixin import ReferenceMixin, withheld
from .router_mixin import RouterTrainerMixin


class _PreferenceTrainer(ReferenceMixin):
    """Of the two trainers that take a reference model in their constructor."""

    def __init__(
        self,
        model: Any = None,
        ref_model: Any = None,
        args: Any = None,
        *more: Any,
        reference: str | None = None,
        **named: Any,
    ) -> None:
        if ref_model is not None:
            if reference is not None:
                raise PeftMoeError(
                    f"reference={reference!r} and ref_model={type(ref_model).__name__} are two references; "
                    "give one"
                )
            super().__init__(model, ref_model, args, *more, **named)
            return
        ours = self._make_reference(reference, args)
        follows = bool(getattr(args, "sync_ref_model", False))
        with withheld(args, sync_ref_model=False):
            super().__init__(model, ours, args, *more, **named)
        self._begin_reference(ours, follows)


class MoLoraDPOTrainer(_PreferenceTrainer, DPOTrainer):  # type: ignore[misc]  # trl is untyped here
    """TRL's ``DPOTrainer`` for mixtures; takes the same arguments, and ``reference``.

    Args:
        reference: "start" (the default): the mixture as training began, so that the first loss is ln 2; it
            costs a copy of the router, and a checkpoint keeps it. "base": the base without the mixture, which
            TRL takes for a model made from ``peft_config``. A ``ref_model`` of your own replaces both.

    ``sync_ref_model`` works with "start", which TRL refuses for PEFT models. A column ``domain`` is for the
    label losses, and holds for both answers.
    """


class MoLoraKTOTrainer(_PreferenceTrainer, KTOTrainer):  # type: ignore[misc]  # trl is untyped here
    """TRL's ``KTOTrainer`` for mixtures; ``reference`` as in :class:`MoLoraDPOTrainer`."""


class MoLoraRewardTrainer(RouterTrainerMixin, RewardTrainer):  # type: ignore[misc]  # trl is untyped here
    """TRL's ``RewardTrainer`` for mixtures; takes the same arguments.

    The config's ``task_type`` is "SEQ_CLS": PEFT then trains and saves the new head, ``score``, beside the
    router. Rewards have no reference.
    """
