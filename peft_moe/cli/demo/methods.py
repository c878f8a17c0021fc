"""The methods that the demo compares: base, single experts, mixture without gates, two routers, oracle."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from ...evaluation import TurnScore, score_texts
from ...fitting import fit_router
from ...tuner.config.mixture import MoLoraConfig
from . import BASE_NAME, asset_path
from .data import Turns, as_text
from .skills import EXPERTS, label

Scored = dict[str, list[list[TurnScore]]]
"""Column of the table → the scores of each text's turns."""

BATCH = 32


@dataclass
class Training:
    """The training of the demo's router.

    Attributes:
        steps: optimizer steps of 32 samples each.
        learning_rate: learning rate that refines a fitted router. A router that starts from zero needs 1e-2
            or more, and several minutes instead of one.
        per_expert: labelled samples per expert's skill. The base's skills get as many in total as all
            experts together.
        mixture: fields of ``MoLoraConfig`` other than the experts.
    """

    steps: int = 60
    learning_rate: float = 2.0e-3
    per_expert: int = 150
    mixture: dict[str, Any] = field(
        default_factory=lambda: {"router": "context", "router_label_loss_coef": 1.0}
    )


def load_base() -> nn.Module:
    """Load a fresh copy of the demo's base in float32."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(asset_path(BASE_NAME), dtype="float32")
    return model


def expert_paths() -> dict[str, str]:
    """Return the name and folder of each expert."""
    return {name: str(asset_path(f"experts/{name}")) for name in EXPERTS}


def build_mixture(**fields: Any) -> PeftModel:
    """Build the demo's base with all its experts, frozen, and a router."""
    config = MoLoraConfig(experts=expert_paths(), task_type="CAUSAL_LM", **fields)
    model: PeftModel = get_peft_model(load_base(), config)
    return model


def score(model: nn.Module, tokenizer: Any, texts: Mapping[str, Sequence[Turns]]) -> Scored:
    """Score the texts of every column of the table."""
    return {
        row: score_texts(model, tokenizer, [as_text(turns) for turns in row_texts], batch_size=64)
        for row, row_texts in texts.items()
    }


def score_expert(name: str, tokenizer: Any, texts: Mapping[str, Sequence[Turns]]) -> Scored:
    """Score one expert alone, loaded with plain PEFT."""
    model = PeftModel.from_pretrained(load_base(), expert_paths()[name])
    return score(model, tokenizer, texts)


def oracle(scored: Mapping[str, Scored], texts: Mapping[str, Sequence[Turns]]) -> Scored:
    """Return for each answer the score of its skill's expert, run over the whole text, or else of the base.

    Args:
        scored: scores of "base" and of every single expert.
        texts: texts of each column; every turn names its skill.
    """
    return {
        row: [
            [scored[label(turn.domain)][row][text][number] for number, turn in enumerate(turns)]
            for text, turns in enumerate(row_texts)
        ]
        for row, row_texts in texts.items()
    }


def train_router(samples: list[dict[str, str]], tokenizer: Any, plan: Training, seed: int, out: str) -> Any:
    """Fit the router, then train it with TRL; experts and base stay frozen.

    Args:
        samples: samples with prompt, completion and domain.
        tokenizer: the base's tokenizer.
        plan: the training's settings.
        seed: seed of the order of samples.
        out: folder for the trainer's own files.

    Returns:
        The trained PeftModel, in evaluation mode.
    """
    from datasets import Dataset
    from trl import SFTConfig  # type: ignore[attr-defined]  # trl exports lazily

    from ...training import MoLoraSFTTrainer

    args = SFTConfig(
        out,
        max_steps=plan.steps,
        per_device_train_batch_size=BATCH,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        max_length=None,
        seed=seed,
        logging_steps=max(1, plan.steps // 6),
        save_strategy="no",
        report_to=[],
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
    )
    model = build_mixture(**plan.mixture)
    fit_router(model, samples, tokenizer, progress=False)
    trainer = MoLoraSFTTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_list(samples),
        processing_class=tokenizer,
    )
    trainer.train()
    trained: Any = trainer.model.eval()
    trained.peft_config["default"].base_model_name_or_path = os.fspath(asset_path(BASE_NAME))
    return trained


def fit_mixture(samples: list[dict[str, str]], tokenizer: Any, progress: bool) -> PeftModel:
    """Build the same mixture and fit its router to the same prompts, without gradients."""
    model = build_mixture(router="context")
    fit_router(model, samples, tokenizer, progress=progress)
    return model.eval()
