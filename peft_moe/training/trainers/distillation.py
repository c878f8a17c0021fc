"""Distillation into a mixture: from a given teacher, or from each sample's own expert.

The total is α·CE + β·T²·KL(teacher ‖ mixture), over the tokens that the language loss counts. Without a
teacher the same model teaches itself: a pass without gradients in which every layer uses the sample's own
expert alone, or none (the base) where its domain has no expert. No second model is held in memory.

Trainers that fuse the LM head with the loss never show logits, so the student's are made here, from the
hidden states behind its last layer and at scored tokens only. Letters: B batch, T sequence, S = T − 1,
N scored tokens, V vocabulary, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PeftMoeError
from ...routers.losses import distillation_kl
from ...routing.context import routing_inputs
from ...routing.model_call import IGNORE
from ...tuner.config.mixture import MoLoraConfig
from ...tuner.layers.linear import MoLoraLayer

# Of logits made here against the model's own, as a share of their size: bf16 rounds to 1e-2 at most.
_SAME_LOGITS = 2e-2


class Distiller:
    """Computes the distillation loss of one batch.

    Args:
        base: the causal language model inside the PeftModel.
        config: the mixture's.
        teacher: a causal language model of the same vocabulary; None lets each sample's expert teach.
        autocast: makes the context in which the trainer runs the model.

    Raises:
        PeftMoeError: the base is no causal language model, or the teacher has another vocabulary.
    """

    def __init__(self, base: Any, config: MoLoraConfig, teacher: nn.Module | None, autocast: Any) -> None:
        self.base, self.config, self.teacher, self.autocast = base, config, teacher, autocast
        self.hidden_BTH: Tensor | None = None
        self._checked = False
        backbone = getattr(base, "base_model", base)
        if backbone is base or base.config.is_encoder_decoder or base.get_output_embeddings() is None:
            raise PeftMoeError(
                f"distillation_coef={config.distillation_coef} needs a causal language model, not a "
                f"{type(base).__name__}; set it to 0"
            )
        if isinstance(base.get_output_embeddings(), MoLoraLayer):
            raise PeftMoeError(
                "distillation_coef cannot be combined with experts on the LM head, which trainers that fuse "
                "it with the loss leave out; take it out of target_modules"
            )
        if teacher is not None:
            _check_vocabulary(teacher, base)
            teacher.requires_grad_(False).eval()

    def teach(self, model: nn.Module, inputs: dict[str, Any], known: dict[str, Any]) -> Tensor | None:
        """The teacher's logits at the tokens that count, [N, V]; None for a batch that cannot be taught.

        Args:
            model: the student, as the trainer calls it.
            inputs: the batch.
            known: ``prompt_mask`` and ``domains`` of the batch, for :func:`peft_moe.routing_inputs`.
        """
        if inputs.get("labels") is None or (self.teacher is None and known["domains"] is None):
            return None
        call = {key: value for key, value in inputs.items() if key not in ("labels", "num_items_in_batch")}
        call["use_cache"] = False
        with torch.no_grad(), _resting(model):
            if not self._checked:
                self._check_head(model, call, inputs["labels"])
            if self.teacher is None:
                with routing_inputs(gates=own_expert_gates(known["domains"], self.config)):
                    logits_BTV = model(**call).logits
            else:
                with routing_inputs(**known), self.autocast():
                    logits_BTV = self.teacher(**call).logits
        return _scored(logits_BTV, inputs["labels"])

    @contextmanager
    def listen(self, *, with_grad_only: bool) -> Iterator[None]:
        """Keep the student's last hidden states of the passes inside the block; the last one wins."""

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if torch.is_grad_enabled() or not with_grad_only:
                self.hidden_BTH = output[0]

        handle = self.base.base_model.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def loss(self, teacher_NV: Tensor, labels_BT: Tensor) -> Tensor:
        """``T²·KL`` summed over the scored tokens of the pass that was listened to."""
        assert self.hidden_BTH is not None, "no pass of the student was heard"
        student_NV = self._head(_scored(self.hidden_BTH, labels_BT))
        self.hidden_BTH = None
        return distillation_kl(
            teacher_NV.to(student_NV.device), student_NV, self.config.distillation_temperature
        )

    def _head(self, hidden_NH: Tensor) -> Tensor:
        head, text = self.base.get_output_embeddings(), self.base.config.get_text_config()
        if head.weight.is_floating_point():
            hidden_NH = hidden_NH.to(head.weight.dtype)
        with self.autocast():
            logits_NV: Tensor = head(hidden_NH.to(head.weight.device))
        for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
            logits_NV = logits_NV * (getattr(text, name, None) or 1.0)
        logits_NV = logits_NV / (getattr(text, "logits_scaling", None) or 1.0)
        cap = getattr(text, "final_logit_softcapping", None)
        return logits_NV if cap is None else torch.tanh(logits_NV / cap) * cap

    def _check_head(self, model: nn.Module, call: dict[str, Any], labels_BT: Tensor) -> None:
        """Once: whether the logits made here are the base's own."""
        nobody = torch.zeros(1, self.config.num_experts)
        with self.listen(with_grad_only=False), routing_inputs(gates=nobody):
            wanted_NV = _scored(model(**call).logits, labels_BT).float()
        assert self.hidden_BTH is not None
        found_NV = self._head(_scored(self.hidden_BTH, labels_BT)).float()
        self.hidden_BTH = None
        if (found_NV - wanted_NV).norm() > _SAME_LOGITS * wanted_NV.norm():
            raise PeftMoeError(
                f"{type(self.base).__name__} does more to its logits than its LM head and the known scales, "
                "so that its tokens cannot be distilled; set distillation_coef=0"
            )
        self._checked = wanted_NV.numel() > 0


def own_expert_gates(domains: Tensor, config: MoLoraConfig) -> Tensor:
    """One-hot gates of each domain's expert; zeros, hence the base alone, where it has none.

    Args:
        domains: router columns, long [B] or [B, T]; the null expert's and -1 have no expert.
        config: the mixture's.

    Returns:
        float32 [B, E] or [B, T, E].
    """
    names = config.expert_names
    experts = [names.index(name) for name in config.routed_names]
    # Two more rows: one for the null expert, one that the index -1 finds.
    rows = torch.zeros(len(experts) + 2, config.num_experts, device=domains.device)
    rows[list(range(len(experts))), experts] = 1.0
    return rows[domains]


def _check_vocabulary(teacher: Any, base: Any) -> None:
    theirs, ours = (m.config.get_text_config().vocab_size for m in (teacher, base))
    if theirs != ours:
        raise PeftMoeError(
            f"the teacher's vocabulary has {theirs} tokens, the base's {ours}: their next-token "
            "distributions cannot be compared; take a teacher with the base's own tokenizer"
        )


def _scored(values_BTX: Tensor, labels_BT: Tensor) -> Tensor:
    """Rows [N, X] at the positions whose next token counts."""
    counted_BS = labels_BT[:, 1:].to(values_BTX.device) != IGNORE
    return values_BTX[:, :-1][counted_BS]


@contextmanager
def _resting(model: nn.Module) -> Iterator[None]:
    """Without dropout, whatever of the model is in training mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def per_scored_token(total: Tensor, tokens: int, num_items: Any, trainer: Any) -> Tensor:
    """A loss that was summed over tokens, divided as the trainer divides the language model's.

    Args:
        total: the sum over this batch.
        tokens: how many were added up.
        num_items: scored tokens of the whole step; None divides by those of this batch.
        trainer: tells whether the step's tokens are those of all processes.
    """
    if num_items is None:
        return total / max(1, tokens)
    loss = total / num_items
    if getattr(trainer.args, "average_tokens_across_devices", False):
        loss = loss * trainer.accelerator.num_processes
    return loss
