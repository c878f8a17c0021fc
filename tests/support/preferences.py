"""TRL's trainers of preferences and rewards on tiny mixtures, and log-probabilities from plain logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig

from peft_moe import routing_inputs
from peft_moe.training import (
    MoLoraDPOTrainer,
    MoLoraGRPOTrainer,
    MoLoraKTOTrainer,
    MoLoraRewardTrainer,
)

from .training import defaults_for, samples, tokenizer

TRAINERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "dpo": (MoLoraDPOTrainer, DPOConfig, {"max_length": None}),
    "kto": (MoLoraKTOTrainer, KTOConfig, {"max_length": None}),
    "grpo": (
        MoLoraGRPOTrainer,
        GRPOConfig,
        {"num_generations": 2, "max_completion_length": 6, "beta": 0.1, "temperature": 1.0},
    ),
    "reward": (MoLoraRewardTrainer, RewardConfig, {"max_length": None}),
}
WITH_REFERENCE = ("dpo", "kto", "grpo")


def rows_for(kind: str, count: int = 8, equal: bool = False) -> list[dict[str, Any]]:
    """Records as each trainer takes them; what is right is as random as the rest."""
    rows = []
    for index, (one, other) in enumerate(
        zip(samples(count, 0, equal), samples(count, 1, equal), strict=True)
    ):
        known = {"prompt": one["prompt"], "domain": one["domain"]}
        if kind in ("dpo", "reward"):
            rows.append({**known, "chosen": one["completion"], "rejected": other["completion"]})
        elif kind == "kto":
            rows.append({**known, "completion": one["completion"], "label": index % 2 == 0})
        else:
            rows.append(known)
    return rows


def vowels(completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward that tells most completions apart."""
    return [sum(letter in "aeiou" for letter in text) + 0.1 * len(text) for text in completions]


def make_preference_trainer(
    kind: str,
    model: Any,
    folder: Path,
    *,
    rows: list[dict[str, Any]] | None = None,
    given: dict[str, Any] | None = None,
    plain: Any = None,
    **settings: Any,
) -> Any:
    """One of ``TRAINERS`` with the mixin; ``plain`` is a class of TRL's to take instead.

    Args:
        rows: the data, those of ``rows_for`` by default.
        given: further arguments of the constructor.
        settings: of the trainer's config.
    """
    made, config, own = TRAINERS[kind]
    known = config.__dataclass_fields__
    args = config(**{k: v for k, v in {**defaults_for(folder), **own, **settings}.items() if k in known})
    given = {"processing_class": tokenizer(), **(given or {})}
    if kind == "grpo":
        given.setdefault("reward_funcs", vowels)
    data = Dataset.from_list(rows_for(kind) if rows is None else rows)
    return (plain or made)(model, args=args, train_dataset=data, **given)


def logps(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Log-probabilities of each answer's tokens, [B, T-1], zero at others: from plain logits, in float64.

    ``batch`` has ``input_ids``, ``attention_mask`` and ``completion_mask``, all [B, T].
    """
    prompt = batch["completion_mask"] == 0
    with torch.no_grad(), routing_inputs(prompt_mask=prompt):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    spread = logits[:, :-1].double().log_softmax(-1)
    chosen = spread.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return chosen * batch["completion_mask"][:, 1:]


def batch_of(trainer: Any) -> dict[str, Tensor]:
    """The first samples as one batch of the trainer; GRPO generates their completions."""
    if hasattr(trainer, "_generate_and_score_completions"):
        trainer.model.train()
        drawn = trainer._generate_and_score_completions([trainer.train_dataset[i // 2] for i in range(8)])
        masks = torch.zeros_like(drawn["prompt_mask"]), drawn["completion_mask"]
        return {
            "input_ids": torch.cat([drawn["prompt_ids"], drawn["completion_ids"]], 1),
            "attention_mask": torch.cat([drawn["prompt_mask"], drawn["completion_mask"]], 1),
            "completion_mask": torch.cat(masks, 1),
            "drawn": drawn,
        }
    return trainer.data_collator([trainer.train_dataset[i] for i in range(8)])


def reference_logps(trainer: Any, batch: dict[str, Tensor]) -> Tensor:
    """What the trainer's reference model says of each answer, [B]."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    call = {key: batch[key] for key in ("input_ids", "attention_mask")}
    out = trainer.ref_model(**call, labels=labels, fused_lm_head=True)
    return out.log_probs.sum(-1)


class KeepBatches(TrainerCallback):
    """Remembers every batch whose loss is computed."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Any]] = []

    def listen(self, trainer: Any) -> KeepBatches:
        compute_loss = trainer.compute_loss

        def spy(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.batches.append(dict(inputs))
            return compute_loss(model, inputs, *args, **kwargs)

        trainer.compute_loss = spy
        return self
