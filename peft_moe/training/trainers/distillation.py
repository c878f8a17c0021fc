"""Distillation into a mixture, from a separate teacher or from each sample's own expert.

The total loss is α·CE + β·T²·KL(teacher ‖ mixture) over the scored tokens, which are those that count in the
language model's loss. Without a separate teacher the model teaches itself: in a pass without gradients every
layer uses the sample's own expert alone, or the base where the sample's domain has no expert. No second model
is in memory.

TRL's trainers can fuse the LM head with the loss and then return no logits. This module therefore keeps the
student's last hidden states [B, T, H] and applies the LM head to them itself, at scored tokens only. Logits
[B, T, V] of all tokens would be the largest tensor of the step.

Letters: B batch, T sequence, N scored tokens, V vocabulary, E experts, H hidden.
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
from ...tuner.config.mixture import MoLoraConfig
from ...tuner.layers.linear import MoLoraLayer
from .scored_tokens import at_scored_tokens, evaluation_mode, scored_logits

# Largest relative difference between the logits made here and the model's own: bf16 rounds to 1e-2 at most.
_SAME_LOGITS = 2e-2


class Distiller:
    """Computes the distillation loss of one batch.

    A training step calls ``teach`` before the student's pass, wraps the pass in ``keep_hidden_states``, and
    calls ``loss`` after it.

    Args:
        base: the causal language model inside the PeftModel.
        config: the mixture's.
        teacher: a causal language model of the same vocabulary; None lets each sample's expert teach.
        autocast: makes the context in which the trainer runs the model.

    Raises:
        PeftMoeError: the base is no causal language model, its LM head has experts, or the teacher has
            another vocabulary.
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
                "distillation_coef cannot be combined with experts on the LM head, because trainers that "
                "fuse the head with the loss skip them; take the head out of target_modules"
            )
        if teacher is not None:
            _check_vocabulary(teacher, base)
            teacher.requires_grad_(False).eval()

    def teach(self, model: nn.Module, inputs: dict[str, Any], batch_context: dict[str, Any]) -> Tensor | None:
        """Return the teacher's logits [N, V] at the scored tokens, or None for a batch without a teacher.

        A batch has no teacher if it has no labels, or if each sample's expert teaches and no domain is known.

        Args:
            model: the student, as the trainer calls it.
            inputs: the batch.
            batch_context: ``prompt_mask`` and ``domains`` of the batch, for :func:`peft_moe.routing_inputs`.
        """
        domains = batch_context["domains"]
        if inputs.get("labels") is None or (self.teacher is None and domains is None):
            return None
        with torch.no_grad(), evaluation_mode(model):
            if not self._checked:
                self._check_head(model, inputs)
            if self.teacher is None:
                with routing_inputs(gates=own_expert_gates(domains, self.config)):
                    return scored_logits(model, inputs)
            with routing_inputs(**batch_context), self.autocast():
                return scored_logits(self.teacher, inputs)

    @contextmanager
    def keep_hidden_states(self, *, with_grad_only: bool) -> Iterator[None]:
        """Keep the student's last hidden states of the latest pass inside the block.

        Args:
            with_grad_only: whether to ignore passes without gradients, such as those of a reference model.
        """

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if torch.is_grad_enabled() or not with_grad_only:
                self.hidden_BTH = output[0]

        handle = self.base.base_model.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def loss(self, teacher_NV: Tensor, labels_BT: Tensor) -> Tensor:
        """Return ``T²·KL`` of the pass whose hidden states were kept, summed over its scored tokens."""
        student_NV = self._student_logits(labels_BT)
        temperature = self.config.distillation_temperature
        return distillation_kl(teacher_NV.to(student_NV.device), student_NV, temperature)

    def _student_logits(self, labels_BT: Tensor) -> Tensor:
        assert self.hidden_BTH is not None, "no pass of the student has run"
        hidden_NH, self.hidden_BTH = at_scored_tokens(self.hidden_BTH, labels_BT), None
        return self._head(hidden_NH)

    def _head(self, hidden_NH: Tensor) -> Tensor:
        """Apply the LM head, and the scales and the cap that models of transformers put on their logits."""
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

    def _check_head(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Check on the first batch that the logits made here are the base's own."""
        base_alone = torch.zeros(1, self.config.num_experts)
        with self.keep_hidden_states(with_grad_only=False), routing_inputs(gates=base_alone):
            expected_NV = scored_logits(model, inputs).float()
        actual_NV = self._student_logits(inputs["labels"]).float()
        if (actual_NV - expected_NV).norm() > _SAME_LOGITS * expected_NV.norm():
            raise PeftMoeError(
                f"{type(self.base).__name__} changes its logits by more than its LM head and the known "
                "scales, so that its tokens cannot be distilled; set distillation_coef=0"
            )
        self._checked = expected_NV.numel() > 0


def own_expert_gates(domains: Tensor, config: MoLoraConfig) -> Tensor:
    """Return one-hot gates of each domain's expert; a domain without an expert gets zeros, the base alone.

    Args:
        domains: router columns, long [B] or [B, T]; the null expert's column and -1 have no expert.
        config: the mixture's.

    Returns:
        float32 [B, E] or [B, T, E].
    """
    names = config.expert_names
    experts = [names.index(name) for name in config.routed_names]
    # Two more rows of zeros: one for the null expert's column, and the last one, which index -1 selects.
    rows = torch.zeros(len(experts) + 2, config.num_experts, device=domains.device)
    rows[list(range(len(experts))), experts] = 1.0
    return rows[domains]


def _check_vocabulary(teacher: Any, base: Any) -> None:
    teacher_tokens, base_tokens = (m.config.get_text_config().vocab_size for m in (teacher, base))
    if teacher_tokens != base_tokens:
        raise PeftMoeError(
            f"the teacher's vocabulary has {teacher_tokens} tokens, the base's {base_tokens}: their "
            "next-token distributions cannot be compared; take a teacher with the base's own tokenizer"
        )
