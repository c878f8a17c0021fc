"""One LoRA, the student, trained with TRL's ``SFTTrainer`` to predict what a mixture predicts.

Letters: B batch, T sequence, N scored tokens, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]  # trl exports it lazily

from ...routers.losses import distillation_kl
from ...routing.context import RoutingRecord, record_routing, routing_inputs
from ...routing.model_call import IGNORE
from .scored_tokens import at_scored_tokens, evaluation_mode, logits_call, per_scored_token, scored_logits


class ImitationTrainer(SFTTrainer):
    """TRL's trainer with the loss ``T² · KL(teacher ‖ student)`` over the scored tokens.

    Args:
        model: the student.
        teacher: a model of the same vocabulary; its weights stay as they are.
        temperature: T.
    """

    def __init__(self, model: Any, *args: Any, teacher: nn.Module, temperature: float, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval()
        self.temperature = temperature

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the divergence per scored token of the step."""
        teacher_NV = mixture_logits(self.teacher, inputs)
        outputs = model(**logits_call(inputs))
        student_NV = at_scored_tokens(outputs.logits, inputs["labels"])
        total = distillation_kl(teacher_NV, student_NV, self.temperature)
        loss = per_scored_token(total, len(teacher_NV), num_items_in_batch, self)
        return (loss, outputs) if return_outputs else loss


def sft_config(values: dict[str, Any]) -> SFTConfig:
    """Build TRL's arguments, so that callers need not import trl."""
    return SFTConfig(**values)


def mixture_logits(mixture: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Return a mixture's logits [N, V] at the scored tokens; the other tokens are the router's prompt."""
    with torch.no_grad(), routing_inputs(prompt_mask=inputs["labels"] == IGNORE):
        return scored_logits(mixture, inputs)


def batches(
    trainer: ImitationTrainer, dataset: Any, max_batches: int | None = None
) -> Iterator[dict[str, Any]]:
    """Yield a prepared dataset in order, as the trainer's collator makes batches, on the trainer's device."""
    for number, batch in enumerate(trainer.get_eval_dataloader(dataset)):
        if max_batches is not None and number >= max_batches:
            return
        yield {key: value.to(trainer.args.device) for key, value in batch.items()}


def mean_gates(mixture: nn.Module, inputs: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
    """Return the mean gates [E] over real tokens, of every router by its name."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, float] = {}
    for batch in inputs:
        with record_routing() as record:
            mixture_logits(mixture, batch)
        _add_gates(record, batch["attention_mask"], sums, counts)
    return {name: total / counts[name] for name, total in sums.items()}


def _add_gates(
    record: RoutingRecord, mask_BT: Tensor, sums: dict[str, Tensor], counts: dict[str, float]
) -> None:
    for name, routing in record.decisions.items():
        gates_BTE = routing.gates.detach().double().cpu()
        real_BT = torch.ones(gates_BTE.shape[:-1], dtype=torch.double)
        # A router that decides once for all prompts records gates of shape [1, 1, E], without padding.
        if real_BT.shape == mask_BT.shape:
            real_BT = mask_BT.double().cpu()
        sums[name] = sums.get(name, 0) + (gates_BTE * real_BT[..., None]).sum((0, 1))
        counts[name] = counts.get(name, 0.0) + float(real_BT.sum())


@dataclass
class Gap:
    """How far a model is from the mixture on held-out texts.

    Attributes:
        loss: mean negative log-likelihood of a scored token, in nats.
        kl: mean KL(mixture ‖ model) of a scored token, in nats.
        agreement: share of scored tokens at which model and mixture predict the same token.
    """

    loss: float = 0.0
    kl: float = 0.0
    agreement: float = 0.0


def measure(mixture: nn.Module, student: Any, inputs: Iterable[dict[str, Any]]) -> tuple[dict[str, Gap], int]:
    """Measure the gaps of "base", "student" and "mixture" to the mixture.

    Args:
        mixture: the teacher.
        student: a PeftModel with one LoRA; with its adapter disabled, it is the base.
        inputs: held-out batches.

    Returns:
        The gap of each model by name, and the number of scored tokens.
    """
    gaps = {name: Gap() for name in ("base", "student", "mixture")}
    tokens = 0
    with torch.no_grad(), evaluation_mode(student):
        for batch in inputs:
            target_N = batch["labels"][:, 1:][batch["labels"][:, 1:] != IGNORE]
            mixture_NV = mixture_logits(mixture, batch).float()
            tokens += len(target_N)
            logits = {"student": scored_logits(student, batch), "mixture": mixture_NV}
            with student.disable_adapter():
                logits["base"] = scored_logits(student, batch)
            for name, logits_NV in logits.items():
                _add_gap(gaps[name], mixture_NV, logits_NV.float(), target_N)
    for gap in gaps.values():
        for name, total in vars(gap).items():
            setattr(gap, name, total / max(1, tokens))
    return gaps, tokens


def _add_gap(gap: Gap, mixture_NV: Tensor, logits_NV: Tensor, target_N: Tensor) -> None:
    gap.loss += float(functional.cross_entropy(logits_NV, target_N, reduction="sum"))
    gap.kl += float(distillation_kl(mixture_NV, logits_NV, 1.0))
    gap.agreement += float((mixture_NV.argmax(-1) == logits_NV.argmax(-1)).sum())
