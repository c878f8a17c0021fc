"""What trainers with a reference model share: its choice, its updates, its checkpoints and its limits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from ...errors import PeftMoeError
from ...routing.context import routing_inputs
from ..data.domain_labels import DOMAIN_INDEX, per_row_domains
from .reference_model import BASE, START, Reference
from .router_mixin import RouterTrainerMixin


class ReferenceCallback(TrainerCallback):
    """Stores the reference when training begins, and moves it towards the policy if that is asked for.

    Args:
        reference: the reference model.
        follows: whether ``sync_ref_model`` is set.
    """

    def __init__(self, reference: Reference, follows: bool) -> None:
        self.reference, self.follows = reference, follows

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Store the weights that are loaded now; a checkpoint that was resumed from has stored its own."""
        self.reference.store()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the reference towards the policy every ``ref_model_sync_steps``."""
        if self.follows and state.global_step % args.ref_model_sync_steps == 0:
            self.reference.follow(args.ref_model_mixup_alpha)


class ReferenceMixin(RouterTrainerMixin):
    """Adds a reference model to :class:`RouterTrainerMixin`; a trainer of TRL follows it."""

    reference: Reference | None = None

    def _make_reference(self, kind: str | None, args: Any) -> Reference:
        """Make the reference before the trainer's own constructor, which loads models: errors come first."""
        reference = Reference(kind or START, lambda: self.model)  # type: ignore[arg-type, return-value]
        follows = getattr(args, "sync_ref_model", False)
        if follows and reference.kind == BASE:
            raise PeftMoeError(
                "sync_ref_model=True moves the reference, and reference='base' never moves; take "
                "reference='start' or sync_ref_model=False"
            )
        if follows and getattr(args, "precompute_ref_log_probs", False):
            raise PeftMoeError(
                "sync_ref_model=True moves the reference, whose log-probabilities "
                "precompute_ref_log_probs=True computes once; set one of the two to False"
            )
        if _sharded(args):
            raise PeftMoeError(
                "FSDP and DeepSpeed shard the parameters that a reference exchanges; train with DDP (routers "
                "are small), or with TRL's own trainer, whose reference is an adapter or the base"
            )
        return reference

    def _begin_reference(self, reference: Reference, follows: bool) -> None:
        self.reference = reference
        if getattr(self.args, "precompute_ref_log_probs", False):
            reference.store()  # the log-probabilities of these weights have just been computed
        self.add_callback(ReferenceCallback(reference, follows))  # type: ignore[attr-defined]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Run the trainer's own ``train``.

        Raises:
            PeftMoeError: the policy has changed since the log-probabilities of its reference were computed.
        """
        self._check_precomputed()
        return super().train(*args, **kwargs)

    def _check_precomputed(self) -> None:
        precomputed = getattr(self.args, "precompute_ref_log_probs", False)
        state: Any = getattr(self, "state")  # noqa: B009  # the trainer's own, untyped
        starts = state.global_step == 0
        if precomputed and starts and self.reference is not None and self.reference.differs():
            raise PeftMoeError(
                "precompute_ref_log_probs=True computed the reference when the trainer was made, and the "
                "router has changed since (fitted?); change it before, or set precompute_ref_log_probs=False"
            )

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """Run the trainer's own method, which precomputes, with the samples' domains for the routers."""
        domains: Tensor | None = per_row_domains(inputs)
        inputs = {key: value for key, value in inputs.items() if key != DOMAIN_INDEX}
        with routing_inputs(domains=domains):
            return super().compute_ref_log_probs(model, inputs)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.reference is not None and self.args.should_save:
            self.reference.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if self.reference is not None and checkpoint is not None:
            precomputed = (
                self.reference.stored if getattr(self.args, "precompute_ref_log_probs", False) else None
            )
            self.reference.load(checkpoint)
            loaded = self.reference.stored or {}
            if any(not value.equal(loaded[name]) for name, value in (precomputed or {}).items()):
                raise PeftMoeError(
                    f"precompute_ref_log_probs=True used another start than that of {checkpoint}; make "
                    "the trainer with the mixture that the run began with, or set "
                    "precompute_ref_log_probs=False"
                )


def _sharded(args: Any) -> bool:
    configured = getattr(args, "fsdp", None) or getattr(args, "deepspeed", None)
    variables = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return bool(configured) or any(
        os.environ.get(name, "false").lower() in ("1", "true") for name in variables
    )


@contextmanager
def replaced_arguments(args: Any, **values: Any) -> Iterator[None]:
    """Replace arguments during a constructor of TRL, which would else make or refuse a reference itself."""
    originals = {name: getattr(args, name) for name in values if hasattr(args, name)}
    try:
        for name in originals:
            setattr(args, name, values[name])
        yield
    finally:
        for name, value in originals.items():
            setattr(args, name, value)
