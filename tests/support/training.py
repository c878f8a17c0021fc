"""Real trainers on tiny mixtures: a tokenizer, labelled samples, arguments, and a look at gradients."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig

from peft_moe import record_routing, routing_inputs
from peft_moe.routers.losses import auxiliary_losses, loss_options
from peft_moe.training import MoLoraSFTTrainer, RouterTrainerMixin
from peft_moe.tuner.layers.shared_router import named_routers

from .bases import VOCAB
from .batches import IGNORE
from .routing import routers

CHARACTERS = string.ascii_lowercase + string.digits + " .:=+?!-\n"
DOMAINS = ("wide", "narrow", "upper", "weather")
Gradients = dict[str, Tensor]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, as many as the tiny bases know."""
    words = ["<pad>", "<bos>", "<eos>", *CHARACTERS]
    assert len(words) == VOCAB
    model = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="."))
    model.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>")


def samples(count: int, seed: int = 0, equal: bool = False) -> list[dict[str, str]]:
    """Prompts, completions and domains; lengths differ unless ``equal``."""
    rng = random.Random(seed)

    def text(length: int) -> str:
        return "".join(rng.choice(string.ascii_lowercase) for _ in range(length))

    rows = []
    for index in range(count):
        prompt = text(6 if equal else rng.randint(3, 12)) + "="
        completion = text(5 if equal else rng.randint(2, 9))
        rows.append({"prompt": prompt, "completion": completion, "domain": DOMAINS[index % 4]})
    return rows


def tokenised(rows: list[dict[str, str]]) -> Dataset:
    """What both trainers take without further preparation: the loss is on the completion."""
    encode = tokenizer()
    out = []
    for row in rows:
        prompt, completion = encode(row["prompt"])["input_ids"], encode(row["completion"])["input_ids"]
        labels = [IGNORE] * len(prompt) + completion
        out.append({"input_ids": prompt + completion, "labels": labels, "domain": row["domain"]})
    return Dataset.from_list(out)


def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """For the plain trainer: pads ids and labels."""
    return DataCollatorForSeq2Seq(tokenizer(), return_tensors="pt")(examples)


class PlainRouterTrainer(RouterTrainerMixin, Trainer):
    """The mixin on transformers' own trainer."""


def defaults_for(folder: Path) -> dict[str, Any]:
    """Arguments of every trainer under test: one step, float32, on the CPU, silent."""
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }


def make_trainer(
    kind: str,
    model: Any,
    data: Dataset,
    folder: Path,
    *,
    given: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """A "sft" or "plain" trainer with the mixin; ``given`` are further constructor arguments."""
    defaults = defaults_for(folder)
    given = given or {}
    if kind == "plain":
        args: Any = TrainingArguments(**defaults | settings)
        return PlainRouterTrainer(model, args, data_collator=collate, train_dataset=data, **given)
    args = SFTConfig(**{"max_length": None, **defaults, **settings})
    given = {"processing_class": tokenizer(), **given}
    return MoLoraSFTTrainer(model, args, train_dataset=data, **given)


class KeepGradients(TrainerCallback):
    """Remembers the trainable gradients right before each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[Gradients] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(gradients(kwargs["model"]))


def gradients(model: nn.Module) -> Gradients:
    """Copies of all gradients; a parameter without one has zeros."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def trained_gradients(kind: str, model: Any, data: Dataset, folder: Path, **settings: Any) -> Gradients:
    """The gradients with which a real trainer would make its first step."""
    keep = KeepGradients()
    make_trainer(kind, model, data, folder, given={"callbacks": [keep]}, **settings).train()
    return keep.steps[0]


def auxiliary_gradients(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    weights: dict[str, float],
    column: Callable[[str], int],
) -> Gradients:
    """Autograd of the auxiliary losses alone, the mean over ``batches``, without any trainer."""
    model.zero_grad()
    for batch in batches:
        domains = torch.tensor([column(name) for name in batch["domain"]])
        call = {key: value for key, value in batch.items() if key != "domain"}
        with routing_inputs(domains=domains), record_routing() as record:
            model(**call)
        config = model.peft_config["default"]
        settings = {name: router.settings for name, router in named_routers(model, "default")}
        losses = auxiliary_losses(record, list(weights), settings=settings, options=loss_options(config))
        (sum(weights[name] * losses[name] for name in weights) / len(batches)).backward()
    found = gradients(model)
    model.zero_grad()
    return found


def batches_of(data: Dataset, size: int) -> list[dict[str, Any]]:
    """The data in order, in padded batches, with their domains."""
    rows, batches = list(data), []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        batch = collate([{k: v for k, v in row.items() if k != "domain"} for row in part])
        batches.append({**batch, "domain": [row["domain"] for row in part]})
    return batches


def joined(values: Gradients) -> Tensor:
    """All numbers in one vector, in the order of the names."""
    return torch.cat([values[name].flatten() for name in sorted(values)])


def router_values(model: nn.Module) -> Tensor:
    """All router weights in one vector."""
    return torch.cat([p.detach().flatten() for _, r in routers(model) for p in r.parameters()])
