"""TRL's trainers for preferences on a mixture: DPO and KTO with a reference, and reward models."""

from __future__ import annotations

from typing import Any

from trl import DPOTrainer, KTOTrainer, RewardTrainer  # type: ignore[attr-defined]  # trl exports it lazily

from ...errors import PeftMoeError
from .reference_mixin import ReferenceMixin, replaced_arguments
from .router_mixin import RouterTrainerMixin


class _PreferenceTrainer(ReferenceMixin):
    """The constructor of the two trainers that take ``ref_model`` as an argument."""

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
        own = self._make_reference(reference, args)
        follows = bool(getattr(args, "sync_ref_model", False))
        with replaced_arguments(args, sync_ref_model=False):
            super().__init__(model, own, args, *more, **named)
        self._begin_reference(own, follows)


class MoLoraDPOTrainer(_PreferenceTrainer, DPOTrainer):  # type: ignore[misc]  # trl is untyped here
    """TRL's ``DPOTrainer`` for mixtures; takes the same arguments, and ``reference``.

    Args:
        reference: "start" (the default) is the mixture at the start of training, so that the first loss is
            ln 2. It costs a copy of the router, which checkpoints contain. "base" is the base without the
            mixture, which TRL uses for a model made from ``peft_config``. ``ref_model`` replaces both.

    ``sync_ref_model`` works with "start"; TRL refuses it for PEFT models. A column ``domain`` is for the
    label losses, and applies to both answers.
    """


class MoLoraKTOTrainer(_PreferenceTrainer, KTOTrainer):  # type: ignore[misc]  # trl is untyped here
    """TRL's ``KTOTrainer`` for mixtures; ``reference`` as in :class:`MoLoraDPOTrainer`."""


class MoLoraRewardTrainer(RouterTrainerMixin, RewardTrainer):  # type: ignore[misc]  # trl is untyped here
    """TRL's ``RewardTrainer`` for mixtures; takes the same arguments.

    With ``task_type="SEQ_CLS"`` in the config, PEFT trains and saves the new head, ``score``, beside the
    router. Reward models need no reference.
    """
