"""One LoRA trained to predict what a mixture predicts, with TRL's ``SFTTrainer``.

Letters: B batch, T sequence, N scored tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from trl import SFTConfig, SFTTrainer

from ...routers.losses import distillation_kl
from ...routing.context import RoutingRecord, record_routing, routing_inputs
from ...routing.model_call import IGNORE
from .distillation import per_scored_token


class ImitationTrainer(SFTTrainer):  # type: ignore[misc]  # trl is untyped here
    """TRL's trainer with ``T² · KL(teacher ‖ student)`` over the scored tokens as its loss.

    Args:
        model: the student.
        teacher: a model of the same vocabulary, left as it is.
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
        """The divergence per scored token of the step."""
        lesson_NV = teach(self.teacher, inputs)
        outputs = model(**call_of(inputs))
        loss = distillation_kl(lesson_NV, scored(outputs.logits, inputs["labels"]), self.temperature)
        loss = per_scored_token(loss, len(lesson_NV), num_items_in_batch, self)
        return (loss, outputs) if return_outputs else loss


def sft_config(values: dict[str, Any]) -> SFTConfig:
    """TRL's arguments."""
    return SFTConfig(**values)


def call_of(inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch as a model is called to show its logits."""
    kept = {key: value for key, value in inputs.items() if key not in ("labels", "num_items_in_batch")}
    return {**kept, "use_cache": False}


def teach(mixture: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Logits [N, V] of a mixture at the scored tokens; what is not scored is its prompt."""
    with torch.no_grad(), routing_inputs(prompt_mask=inputs["labels"] == IGNORE):
        logits_BTV: Tensor = mixture(**call_of(inputs)).logits
    return scored(logits_BTV, inputs["labels"])


def scored(values_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Rows [N, V] at the positions whose next token counts."""
    return values_BTV[:, :-1][labels_BT[:, 1:].to(values_BTV.device) != IGNORE]


def batches(trainer: ImitationTrainer, dataset: Any, most: int | None = None) -> Iterator[dict[str, Any]]:
    """A prepared dataset as the trainer's collator gives it, on its device, in order."""
    for number, batch in enumerate(trainer.get_eval_dataloader(dataset)):
        if most is not None and number >= most:
            return
        yield {key: value.to(trainer.args.device) for key, value in batch.items()}


def mean_gates(mixture: nn.Module, inputs: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
    """Mean gates [E] over real tokens, of every router by its name."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, float] = {}
    for batch in inputs:
        with record_routing() as record:
            teach(mixture, batch)
        _add_gates(record, batch["attention_mask"], sums, counts)
    return {name: total / counts[name] for name, total in sums.items()}


def _add_gates(
    record: RoutingRecord, mask_BT: Tensor, sums: dict[str, Tensor], counts: dict[str, float]
) -> None:
    for name, routing in record.decisions.items():
        gates_BTE = routing.gates.detach().double().cpu()
        real_BT = torch.ones(gates_BTE.shape[:-1], dtype=torch.double)
        if real_BT.shape == mask_BT.shape:
            real_BT = mask_BT.double().cpu()
        sums[name] = sums.get(name, 0) + (gates_BTE * real_BT[..., None]).sum((0, 1))
        counts[name] = counts.get(name, 0.0) + float(real_BT.sum())


@dataclass
class Gap:
    """How far a model is from the mixture on held-out texts.

    Attributes:
        loss: mean negative log-likelihood of a scored token, in nats.
        kl: mean of KL(mixture ‖ model) per scored token, in nats.
        agreement: share of tokens at which both find the same next token most likely.
    """

    loss: float = 0.0
    kl: float = 0.0
    agreement: float = 0.0


def measure(mixture: nn.Module, student: Any, inputs: Iterable[dict[str, Any]]) -> tuple[dict[str, Gap], int]:
    """Gaps of "base", "student" and "mixture", and the number of tokens behind them.

    Args:
        mixture: the teacher.
        student: a PeftModel with one LoRA; without it, it is the base.
        inputs: held-out batches.
    """
    gaps = {name: Gap() for name in ("base", "student", "mixture")}
    tokens = 0
    with torch.no_grad(), _evaluating(student):
        for batch in inputs:
            target_N = batch["labels"][:, 1:][batch["labels"][:, 1:] != IGNORE]
            lesson_NV = teach(mixture, batch).float()
            tokens += len(target_N)
            found = {
                "student": scored(student(**call_of(batch)).logits, batch["labels"]),
                "mixture": lesson_NV,
            }
            with student.disable_adapter():
                found["base"] = scored(student(**call_of(batch)).logits, batch["labels"])
            for name, logits_NV in found.items():
                _add_gap(gaps[name], lesson_NV, logits_NV.float(), target_N)
    for gap in gaps.values():
        for name, total in vars(gap).items():
            setattr(gap, name, total / max(1, tokens))
    return gaps, tokens


def _add_gap(gap: Gap, lesson_NV: Tensor, logits_NV: Tensor, target_N: Tensor) -> None:
    gap.loss += float(functional.cross_entropy(logits_NV, target_N, reduction="sum"))
    gap.kl += float(distillation_kl(lesson_NV, logits_NV, 1.0))
    gap.agreement += float((lesson_NV.argmax(-1) == logits_NV.argmax(-1)).sum())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)
