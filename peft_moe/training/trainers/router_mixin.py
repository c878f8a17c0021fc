"""A mixin that adds what routers need to a Hugging Face trainer: losses, load balancing, logs, checkpoints.

Trainers compute their loss from the model's outputs and ignore any loss that the model adds itself. The mixin
therefore adds the auxiliary losses in ``compute_loss``. It divides them by the accumulation steps exactly
where the trainer expects that, and it logs the loads and entropies of the routers.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...routers import Router
from ...routers.metrics import routing_summary
from ...routing.context import RoutingRecord, record_routing, routing_inputs
from ...routing.model_call import IGNORE
from ...tuner.layers.shared_router import named_routers
from ..data.balanced_sampler import balanced_sampler
from ..data.domain_labels import (
    COLUMNS,
    DOMAIN_INDEX,
    DomainCollator,
    check_domains,
    per_row_domains,
    refuse_unlabelled,
)
from .auxiliary_losses import AuxiliaryTerms, log_name
from .checkpoints import checked_resume, seal, unseal
from .checks import (
    check_checkpointing,
    check_teacher,
    check_trainable,
    mixture_config,
    refuse_distillation,
    restore_router_precision,
    router_weights,
    warn_slow_router,
)
from .distillation import Distiller
from .scored_tokens import per_scored_token
from .step_state import RouterState, StepCallback, StepUpdates


class RouterTrainerMixin:
    """Precedes a subclass of ``transformers.Trainer``: ``class T(RouterTrainerMixin, SFTTrainer)``.

    The model must have an active mixture (``peft_config=MoLoraConfig(…)`` or a PeftModel). The mixture's
    config sets the weights of the losses, the load balancing and the distillation. A ``domain`` column of the
    dataset names each sample's expert.

    Args:
        model: as for the trainer; the arguments that are not listed here are the trainer's, too.
        teacher: for ``distillation_coef``: a causal language model with the base's tokenizer. Without it
            each sample's own expert teaches.
        balanced_domains: whether every step contains equal shares of all domains, as does every batch whose
            size is a multiple of the number of domains. Samples of smaller domains are repeated.

    Raises:
        PeftMoeError: at construction or at ``train()``: there is no mixture or nothing to train, other
            parameters would train, or a loss would have no effect.
    """

    model: nn.Module
    args: Any
    accelerator: Any
    data_collator: Any
    train_dataset: Any

    def __init__(
        self,
        model: Any = None,
        *args: Any,
        teacher: nn.Module | None = None,
        balanced_domains: bool = False,
        **kwargs: Any,
    ) -> None:
        self._balanced = balanced_domains
        before = router_weights(model) if isinstance(model, nn.Module) else {}
        super().__init__(model, *args, **kwargs)  # type: ignore[call-arg]
        self.adapter_name, self.mixture = mixture_config(self.model)
        restore_router_precision(self.model, before)
        check_trainable(self.model, self.mixture)
        check_teacher(teacher, self.mixture)
        self._has_teacher = teacher is not None
        check_domains(self.train_dataset, self.mixture, self.args, has_teacher=self._has_teacher)
        self._keep_domains()
        self._distiller: Distiller | None = None
        if self.mixture.distillation_coef:
            if teacher is not None:
                teacher = self.accelerator.prepare_model(teacher, evaluation_mode=True)
            base = self.model.get_base_model()  # type: ignore[operator]
            self._distiller = Distiller(base, self.mixture, teacher, self.accelerator.autocast)
        self._begin()
        self._eval_prefix = "eval"
        self._routing_log: dict[str, dict[str, list[float]]] = {
            "train": defaultdict(list),
            "eval": defaultdict(list),
        }

    def _keep_domains(self) -> None:
        if self._balanced:
            self._get_train_sampler()
        self.data_collator = DomainCollator(self.data_collator, self.mixture)

    def _begin(self) -> None:
        callbacks: Any = getattr(self, "callback_handler")  # noqa: B009  # the trainer's own, untyped
        state = next((c for c in callbacks.callbacks if isinstance(c, RouterState)), None)
        if state is None:
            state = RouterState()
            callbacks.add_callback(state)
            callbacks.add_callback(StepCallback(self._begin, self._after_step))
        self._experts = self.mixture.expert_names
        self._routers: dict[str, Router] = dict(named_routers(self.model, self.adapter_name))
        self._updates = StepUpdates(self.mixture, self._routers, state.values)
        self._terms = AuxiliaryTerms(self.mixture, self.adapter_name, state.values)

    def _after_step(self) -> None:
        self._updates.step()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Run the trainer's own ``train`` after a last check of what would train.

        ``resume_from_checkpoint=True`` resumes from the newest checkpoint that is complete.
        """
        check_trainable(self.model, self.mixture)
        warn_slow_router(self.args, self.mixture)
        resume = args[0] if args else kwargs.pop("resume_from_checkpoint", None)
        resume = checked_resume(resume, self.args.output_dir)
        return super().train(resume, *args[1:], **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the trainer's checkpoint, and seal it once all processes have written their parts."""
        step = self.state.global_step  # type: ignore[attr-defined]
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{step}"  # type: ignore[attr-defined]
        if self.args.should_save:
            unseal(folder)
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self.accelerator.wait_for_everyone()
        if self.args.should_save and folder.is_dir():
            seal(folder)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> Any:
        """Run the trainer's own ``evaluate``; the metrics of the routers get the same prefix."""
        self._eval_prefix = metric_key_prefix
        self._routing_log["eval"].clear()
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # type: ignore[misc]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self._balanced:
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        trainer: Any = self
        # The sampler asks the trainer, because accelerate does not tell it the epoch of a resumed run.
        return balanced_sampler(
            self.train_dataset if train_dataset is None else train_dataset,
            self.args,
            trainer._train_batch_size,
            seed,
            lambda: trainer.state.global_step,
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        # The trainer drops all columns that are not listed here before the collator sees them.
        columns: list[str] | None = getattr(self, "_signature_columns", None)
        if columns is not None:
            self._signature_columns = [*columns, *(name for name in COLUMNS if name not in columns)]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the trainer's loss plus the weighted auxiliary losses of this pass."""
        if self.mixture.expert_names != self._experts:
            self._begin()  # experts were added or removed, which changes routers and columns
        check_checkpointing(self.model, self.mixture)
        domains, labels = per_row_domains(inputs), inputs.get("labels")
        # The batch itself keeps the column, because a trainer may read the batch again.
        inputs = {key: value for key, value in inputs.items() if key != DOMAIN_INDEX}
        training = self.model.training
        if training and domains is None:
            refuse_unlabelled(self.mixture, self._has_teacher)
        if training and labels is None and self._distiller is not None:
            refuse_distillation(self, self.mixture)
        batch_context: dict[str, Any] = {"prompt_mask": self._prompt_mask(inputs), "domains": domains}
        teacher_NV: Tensor | None = None
        keeping_hidden: AbstractContextManager[None] = nullcontext()
        if self._distiller is not None:
            teacher_NV = self._distiller.teach(model, inputs, batch_context)
            if teacher_NV is not None:
                keeping_hidden = self._distiller.keep_hidden_states(with_grad_only=training)
        with (
            routing_inputs(**batch_context),
            record_routing(with_grad_only=training) as record,
            keeping_hidden,
        ):
            result = super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        total = result[0] if return_outputs else result
        if teacher_NV is not None and labels is not None:
            total = self._distilled(total, teacher_NV, labels, num_items_in_batch)
        total = self._with_terms(total, record, num_items_in_batch)
        return (total, *result[1:]) if return_outputs else total

    def _prompt_mask(self, inputs: dict[str, Any]) -> Tensor | None:
        # A trainer that computes its loss from full logits (label smoothing, compute_loss_func, metrics)
        # gives the model no labels, and a router that pools over the prompt would then pool over the
        # completion as well.
        labels, ids = inputs.get("labels"), inputs.get("input_ids")
        base: Any = self.model.get_base_model()  # type: ignore[operator]
        if labels is None or ids is None or labels.shape != ids.shape or not base.can_generate():
            return None
        mask: Tensor = labels == IGNORE
        return mask

    def _distilled(self, language: Tensor, teacher_NV: Tensor, labels: Tensor, num_items: Any) -> Tensor:
        """Return α·CE + β·T²·KL, both divided by the same number of tokens."""
        assert self._distiller is not None
        training = self.model.training
        divisor = self._accumulation_divisor(num_items) if training else 1
        total = self._distiller.loss(teacher_NV, labels)
        by_step = training and num_items is not None
        loss = per_scored_token(total, len(teacher_NV), num_items if by_step else None, self)
        if not by_step:
            loss = loss / divisor
        loss = loss.to(language.device)
        # The step sums the losses of its micro-batches, each divided by their number; the log takes their
        # mean.
        log = self._routing_log["train" if training else "eval"]
        log["distillation_loss"].append(float(loss.detach()) * divisor)
        language_factor, distillation_factor = self._updates.distillation_factors()
        if training:
            self._updates.count_losses(language, loss, divisor, self._steps_of_batch())
        return language_factor * language + self.mixture.distillation_coef * distillation_factor * loss

    def _with_terms(self, total: Tensor, record: RoutingRecord, num_items: Any) -> Tensor:
        training = self.model.training
        log = self._routing_log["train" if training else "eval"]
        names, shared = self.mixture.expert_names, self.mixture.shared_experts
        settings = {name: router.settings for name, router in self._routers.items()}
        for key, value in routing_summary(record, names, shared, settings).items():
            log[key].append(value)
        divisor = self._accumulation_divisor(num_items) if training else 1
        for name, loss in self._terms.losses(record, self._routers, self.model).items():
            log[log_name(name)].append(float(loss.detach()))
            total = total + (self._terms.weight(name) * loss / divisor).to(total.device)
        if training:
            self._updates.count_decisions(record)
        return total

    def _steps_of_batch(self) -> int:
        return int(getattr(self, "current_gradient_accumulation_steps", 1))

    def _accumulation_divisor(self, num_items_in_batch: Any) -> int:
        """Return the divisor that an auxiliary loss of one micro-batch needs: the accumulation steps, or 1.

        A trainer sums the gradients of a step's micro-batches. If its own loss is already a share of the step
        (divided by the tokens of the whole step), the trainer adds it as it is, and a mean over one
        micro-batch must be divided here. Otherwise the trainer divides the total by the accumulation steps
        itself. The conditions are those of ``transformers.Trainer.training_step``.
        """
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            by_tokens = getattr(self, "model_accepts_loss_kwargs", False) and num_items_in_batch is not None
            scaled = by_tokens or getattr(self, "compute_loss_func", None) is not None
        return self._steps_of_batch() if scaled else 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add loads, entropies, losses and adaptive weights since the last log to the trainer's log."""
        mode = "train" if self.model.training else "eval"
        prefix = "" if mode == "train" else f"{self._eval_prefix}_"
        values = self._routing_log[mode]
        for key, numbers in values.items():
            logs[prefix + key] = sum(numbers) / len(numbers)
        if mode == "train" and values:
            logs.update(self._updates.report())
        values.clear()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]
