"""From a method to a model that can be scored, and what making it cost."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, set_seed

from ...fitting import fit_router
from ...tuner.config.mixture import MoLoraConfig
from .merges import merge
from .methods import Method
from .peft_baselines import arrow, xlora
from .settings import Settings
from .texts import Texts
from .wide_lora import wide_lora


@dataclass
class Cost:
    """What a method costs.

    Attributes:
        trainable: parameters that were fitted or trained.
        seconds: to build, fit and train it, without loading the base.
        tokens_per_second: when scoring, prompts included.
        losses: of training.
    """

    trainable: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    losses: list[float] = field(default_factory=list)


def mixture(base: nn.Module, experts: Mapping[str, str], fields: Mapping[str, Any]) -> PeftModel:
    """Our own mixture with these fields of ``MoLoraConfig``."""
    config = MoLoraConfig(experts=dict(experts), task_type="CAUSAL_LM", **fields)
    model: PeftModel = get_peft_model(base, config)  # type: ignore[assignment, arg-type]
    return model


def alone(base: nn.Module, experts: Mapping[str, str], fields: Mapping[str, Any]) -> PeftModel:
    """One expert, through plain PEFT."""
    return PeftModel.from_pretrained(base, experts[fields["adapter"]])


BUILDERS: dict[str, Callable[[nn.Module, Mapping[str, str], Mapping[str, Any]], nn.Module]] = {
    "base": lambda base, experts, fields: base,
    "expert": alone,
    "mixture": mixture,
    "merge": merge,
    "arrow": arrow,
    "xlora": xlora,
    "width": wide_lora,
}


class MethodBuilder:
    """Builds, fits and trains methods on one base with one set of texts.

    Args:
        settings: of the bake-off.
        texts: its samples.
        tokenizer: of the base.
        out: folder for the trainers' own files.
    """

    def __init__(self, settings: Settings, texts: Texts, tokenizer: Any, out: Path) -> None:
        self.settings, self.texts, self.tokenizer, self.out = settings, texts, tokenizer, out
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def base(self) -> nn.Module:
        """A fresh copy of the base."""
        model = AutoModelForCausalLM.from_pretrained(self.settings.base, dtype=self.settings.dtype)
        moved: nn.Module = model.to(self.device)  # type: ignore[arg-type]
        return moved

    def build(self, one: Method, seed: int) -> tuple[nn.Module, Cost]:
        """The finished model in evaluation mode.

        Raises:
            PeftMoeError, ValueError, …: whatever the method's maker says against it.
        """
        base = self.base()
        set_seed(seed)
        start, losses = time.perf_counter(), []
        model = BUILDERS[one.kind](base, self.settings.experts, one.fields).to(self.device)
        if one.fit is not None:
            self._fit(model, one.fit)
        if one.train:
            losses = self._train(model, one, seed)
        # Not before: a trainer may freeze or free parameters when it takes the model.
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        seconds = time.perf_counter() - start
        return model.eval(), Cost(
            trainable=count if one.train or one.fit else 0, seconds=seconds, losses=losses
        )

    def _fit(self, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        config: Any = model.peft_config[model.active_adapter]  # type: ignore[union-attr, index]
        # Without a null expert there is no column for what belongs to no expert.
        rows = [s for s in self.texts.train if config.null_expert or s["domain"] in self.settings.experts]
        fit_router(model, rows, self.tokenizer, progress=False, **arguments)

    def _train(self, model: nn.Module, one: Method, seed: int) -> list[float]:
        from .training import train

        wide, plan = one.own_budget, self.settings.train
        samples = self.texts.train
        if wide:  # no more than it will see: preparing all takes longer than a short training
            seen = min(len(self.texts.pool), self.settings.width.steps * self.settings.width.batch_size)
            samples = random.Random(seed).sample(self.texts.pool, seen)
        budget = self.settings.width if wide else plan
        rate = self.settings.width.learning_rate if one.kind == "width" else plan.learning_rate
        return train(
            model,
            one.kind,
            samples,
            self.tokenizer,
            steps=budget.steps,
            batch_size=budget.batch_size,
            learning_rate=one.learning_rate or rate,
            max_length=plan.max_length,
            bf16=plan.bf16,
            robust=one.robust,
            seed=seed,
            out=self.out,
        )
