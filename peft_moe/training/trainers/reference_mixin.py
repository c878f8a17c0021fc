"""What trainers with a reference have in common: which one, how it is kept, what cannot be."""

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


class ReferenceSteps(TrainerCallback):
    """Takes the start when training begins, and lets it follow the policy where that is asked for.

    Args:
        reference: what to keep.
        follows: whether ``sync_ref_model`` was set.
    """

    def __init__(self, reference: Reference, follows: bool) -> None:
        self.reference, self.follows = reference, follows

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The weights are in place: those of the constructor, or of a checkpoint that has its own start."""
        self.reference.hold()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The weights have moved."""
        if self.follows and state.global_step % args.ref_model_sync_steps == 0:
            self.reference.follow(args.ref_model_mixup_alpha)


class ReferenceMixin(RouterTrainerMixin):
    """Between :class:`RouterTrainerMixin` and a trainer of TRL that compares with a reference model."""

    reference: Reference | None = None

    def _make_reference(self, kind: str | None, args: Any) -> Reference:
        """Before the trainer's own constructor, so that nothing is loaded for a wrong word."""
        reference = Reference(kind or START, lambda: self.model)  # type: ignore[arg-type, return-value]
        follows = getattr(args, "sync_ref_model", False)
        if follows and reference.kind == BASE:
            raise PeftMoeError(
                "sync_ref_model=True moves the reference, and reference='base' stands still; take "
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
            reference.hold()  # what was just measured
        self.add_callback(ReferenceSteps(reference, follows))  # type: ignore[attr-defined]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own ``train``.

        Raises:
            PeftMoeError: the policy moved since its reference was measured.
        """
        self._check_measured()
        return super().train(*args, **kwargs)

    def _check_measured(self) -> None:
        measured = getattr(self.args, "precompute_ref_log_probs", False)
        state: Any = getattr(self, "state")  # noqa: B009  # the trainer's own, untyped
        if measured and self.reference is not None and state.global_step == 0 and self.reference.moved():
            raise PeftMoeError(
                "precompute_ref_log_probs=True measured the reference when the trainer was made, and the "
                "router was changed since (fitted?); change it before, or set precompute_ref_log_probs=False"
            )

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """The trainer's own, which precomputes; the routers are told the samples' domains."""
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
            measured = getattr(self.args, "precompute_ref_log_probs", False) and self.reference.held
            self.reference.load(checkpoint)
            held = self.reference.held or {}
            if measured and any(not value.equal(held[name]) for name, value in measured.items()):
                raise PeftMoeError(
                    f"precompute_ref_log_probs=True measured another start than that of {checkpoint}; make "
                    "the trainer with the mixture that the run began with, or set "
                    "precompute_ref_log_probs=False"
                )


def _sharded(args: Any) -> bool:
    asked = getattr(args, "fsdp", None) or getattr(args, "deepspeed", None)
    launched = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return bool(asked) or any(os.environ.get(name, "false").lower() in ("1", "true") for name in launched)


@contextmanager
def withheld(args: Any, **values: Any) -> Iterator[None]:
    """Arguments that a constructor is not to see: TRL would make its own reference, or refuse ours."""
    kept = {name: getattr(args, name) for name in values if hasattr(args, name)}
    try:
        for name in kept:
            setattr(args, name, values[name])
        yield
    finally:
        for name, value in kept.items():
            setattr(args, name, value)
