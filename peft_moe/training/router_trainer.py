"""A mixin that makes a Hugging Face trainer train routers rightly.

Trainers rebuild the loss from the model's outputs, so a loss added inside the model is lost without
a word. The mixin adds the auxiliary losses where the trainer computes its own, divides them by the
accumulation steps exactly where the trainer expects that, and logs loads and entropies.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor, nn

from ..call import IGNORE
from ..errors import PeftMoeError
from ..losses import auxiliary_losses
from ..metrics import routing_summary
from ..routing import RoutingRecord, record_routing, routing_inputs
from .domains import DOMAIN, DOMAIN_INDEX, DomainCollator, check_domains
from .guards import (
    active_losses,
    check_checkpointing,
    check_trainable,
    mixture_config,
    restore_router_precision,
    router_weights,
    warn_slow_router,
)

LOG_NAMES = {
    "router_aux_loss_coef": "load_balancing_loss",
    "router_z_loss_coef": "router_z_loss",
    "router_label_loss_coef": "router_label_loss",
}


class RouterTrainerMixin:
    """Put before a ``transformers.Trainer`` subclass: ``class T(RouterTrainerMixin, SFTTrainer)``.

    The model must carry an active mixture (``peft_config=MoLoraConfig(…)`` or a PeftModel). The loss
    weights are those of the config: ``router_aux_loss_coef``, ``router_z_loss_coef``,
    ``router_label_loss_coef``. A ``domain`` column of the dataset names each sample's expert.

    Raises:
        PeftMoeError: at construction or at ``train()``: no mixture, nothing to train, something else
            would train, or a loss that could have no effect.
    """

    model: nn.Module
    args: Any
    data_collator: Any
    train_dataset: Any

    def __init__(self, model: Any = None, *args: Any, **kwargs: Any) -> None:
        before = router_weights(model) if isinstance(model, nn.Module) else {}
        super().__init__(model, *args, **kwargs)  # type: ignore[call-arg]
        self.adapter_name, self.mixture = mixture_config(self.model)
        restore_router_precision(self.model, before)
        check_trainable(self.model, self.mixture)
        check_domains(self.train_dataset, self.mixture, self.args)
        self.data_collator = DomainCollator(self.data_collator, self.mixture)
        self._eval_prefix = "eval"
        self._routing_log: dict[str, dict[str, list[float]]] = {
            "train": defaultdict(list),
            "eval": defaultdict(list),
        }

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own ``train``, after a last look at what would train."""
        check_trainable(self.model, self.mixture)
        warn_slow_router(self.args, self.mixture)
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> Any:
        """The trainer's own ``evaluate``; what is logged of the routers carries the same prefix."""
        self._eval_prefix = metric_key_prefix
        self._routing_log["eval"].clear()
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # type: ignore[misc]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        # Without this the trainer drops the column before the collator sees it.
        columns: list[str] | None = getattr(self, "_signature_columns", None)
        if columns is not None and DOMAIN not in columns:
            self._signature_columns = [*columns, DOMAIN]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The trainer's loss plus the weighted auxiliary losses of this pass."""
        check_checkpointing(self.model, self.mixture)
        domains = inputs.pop(DOMAIN_INDEX, None)
        training = self.model.training
        said = routing_inputs(prompt_mask=self._prompt_mask(inputs), domains=domains)
        with said, record_routing(with_grad_only=training) as record:
            result = super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        extra = self._weighted_losses(record, training)
        if extra is None:
            return result
        if training:
            extra = extra / self._accumulation_share(num_items_in_batch)
        if return_outputs:
            return (result[0] + extra.to(result[0].device), *result[1:])
        return result + extra.to(result.device)

    def _prompt_mask(self, inputs: dict[str, Any]) -> Tensor | None:
        # Losses on full logits (label smoothing, compute_loss_func, metrics) keep the labels from the model,
        # and a router that pools over prompts would see the completion.
        labels, ids = inputs.get("labels"), inputs.get("input_ids")
        base: Any = self.model.get_base_model()  # type: ignore[operator]
        if labels is None or ids is None or labels.shape != ids.shape or not base.can_generate():
            return None
        mask: Tensor = labels == IGNORE
        return mask

    def _weighted_losses(self, record: RoutingRecord, training: bool) -> Tensor | None:
        log = self._routing_log["train" if training else "eval"]
        for key, value in routing_summary(
            record, self.mixture.expert_names, self.mixture.shared_experts
        ).items():
            log[key].append(value)
        names = active_losses(self.mixture)
        if record.context is not None and record.context.domains is None:
            self._refuse_unlabelled(names, training)
            names = [name for name in names if name != "router_label_loss_coef"]
        losses = auxiliary_losses(record, names)
        if names and not losses:
            raise PeftMoeError(
                f"{names[0]} is set, but this pass recorded no routing decision; is the adapter "
                f"{self.adapter_name!r} active and enabled?"
            )
        total: Tensor | None = None
        for name, loss in losses.items():
            log[LOG_NAMES[name]].append(float(loss.detach()))
            weighted = getattr(self.mixture, name) * loss
            total = weighted if total is None else total + weighted
        return total

    def _refuse_unlabelled(self, names: list[str], training: bool) -> None:
        # Held-out data may lack labels; streams show only here that the training data do.
        if training and "router_label_loss_coef" in names:
            raise PeftMoeError(
                f"router_label_loss_coef={self.mixture.router_label_loss_coef} needs a `domain` for each "
                "sample, and this batch has none; add the column, and keep it in data_collator"
            )

    def _accumulation_share(self, num_items_in_batch: Any) -> int:
        # What the trainer itself asks before it divides a step's loss by its accumulation steps.
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            by_tokens = getattr(self, "model_accepts_loss_kwargs", False) and num_items_in_batch is not None
            scaled = by_tokens or getattr(self, "compute_loss_func", None) is not None
        return int(getattr(self, "current_gradient_accumulation_steps", 1)) if scaled else 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's log, with loads, entropy and auxiliary losses since the last one."""
        mode = "train" if self.model.training else "eval"
        prefix = "" if mode == "train" else f"{self._eval_prefix}_"
        for key, values in self._routing_log[mode].items():
            logs[prefix + key] = sum(values) / len(values)
        self._routing_log[mode].clear()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]
