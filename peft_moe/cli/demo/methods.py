"""The demo's methods: the base, each expert alone, the gate-less mixture, two routers, the oracle."""

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
"""Row of the table -> one list of turns per text."""

BATCH = 32


@dataclass
class Training:
    """How the demo's router is trained.

    Attributes:
        steps: optimizer steps of 32 samples each.
        learning_rate: of the gradient's refinement of a fitted router. From zero, a router wants 1e-2
            and more, and several minutes instead of one.
        per_expert: labelled samples of each expert's skill, and as many of the base's in total as of
            all experts.
        mixture: fields of ``MoLoraConfig`` beside the experts.
    """

    steps: int = 60
    learning_rate: float = 2.0e-3
    per_expert: int = 150
    mixture: dict[str, Any] = field(
        default_factory=lambda: {"router": "context", "router_label_loss_coef": 1.0}
    )


def load_base() -> nn.Module:
    """A fresh copy of the demo's base, float32."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(asset_path(BASE_NAME), dtype="float32")
    return model


def expert_paths() -> dict[str, str]:
    """Name and folder of each of the demo's experts."""
    return {name: str(asset_path(f"experts/{name}")) for name in EXPERTS}


def build_mixture(**fields: Any) -> PeftModel:
    """The demo's base with all its experts, frozen, and a router."""
    config = MoLoraConfig(experts=dict(expert_paths()), task_type="CAUSAL_LM", **fields)
    model: PeftModel = get_peft_model(load_base(), config)  # type: ignore[assignment]
    return model


def score(model: nn.Module, tokenizer: Any, texts: Mapping[str, Sequence[Turns]]) -> Scored:
    """Score every row of the table."""
    return {
        row: score_texts(model, tokenizer, [as_text(turns) for turns in some], batch_size=64)
        for row, some in texts.items()
    }


def score_expert(name: str, tokenizer: Any, texts: Mapping[str, Sequence[Turns]]) -> Scored:
    """One expert alone, through plain PEFT."""
    model = PeftModel.from_pretrained(load_base(), expert_paths()[name])
    return score(model, tokenizer, texts)


def oracle(scored: Mapping[str, Scored], texts: Mapping[str, Sequence[Turns]]) -> Scored:
    """For each answer the score of its own skill's expert (over the whole text), else of the base.

    Args:
        scored: of "base" and of every expert alone.
        texts: the rows' texts, which say whose skill each turn is.
    """
    return {
        row: [
            [scored[label(turn.domain)][row][text][number] for number, turn in enumerate(turns)]
            for text, turns in enumerate(some)
        ]
        for row, some in texts.items()
    }


def train_router(samples: list[dict[str, str]], tokenizer: Any, plan: Training, seed: int, out: str) -> Any:
    """Fit the router, then train it, and only it, with TRL.

    Args:
        samples: with prompt, completion and domain.
        tokenizer: of the base.
        plan: how.
        seed: of the order of samples.
        out: folder for the trainer's own files.

    Returns:
        The trained PeftModel, in evaluation mode.
    """
    from datasets import Dataset
    from trl import SFTConfig

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
    model = trainer.model.eval()
    model.peft_config["default"].base_model_name_or_path = os.fspath(asset_path(BASE_NAME))
    return model


def fit_mixture(samples: list[dict[str, str]], tokenizer: Any, progress: bool) -> PeftModel:
    """The same router, solved from the same prompts without a gradient."""
    model = build_mixture(router="context")
    fit_router(model, samples, tokenizer, progress=progress)
    return model.eval()
