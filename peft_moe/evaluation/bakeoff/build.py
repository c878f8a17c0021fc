"""Building the model of a method, fitted or trained, and what that costs."""

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
from .methods import Method
from .peft_baselines import arrow, merge, wide_lora, xlora
from .settings import Settings
from .texts import Texts


@dataclass
class Cost:
    """What a method costs.

    Attributes:
        trainable: number of parameters that were fitted or trained.
        seconds: time to build, fit and train it, without loading the base.
        tokens_per_second: scoring speed, prompts included.
        losses: training losses.
    """

    trainable: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    losses: list[float] = field(default_factory=list)


def mixture(base: nn.Module, experts: Mapping[str, str], fields: Mapping[str, Any]) -> PeftModel:
    """Build a mixture of peft-moe with these fields of ``MoLoraConfig``."""
    config = MoLoraConfig(experts=dict(experts), task_type="CAUSAL_LM", **fields)
    model: PeftModel = get_peft_model(base, config)
    return model


def single_expert(base: nn.Module, experts: Mapping[str, str], fields: Mapping[str, Any]) -> PeftModel:
    """Load one expert with plain PEFT."""
    return PeftModel.from_pretrained(base, experts[fields["adapter"]])


BUILDERS: dict[str, Callable[[nn.Module, Mapping[str, str], Mapping[str, Any]], nn.Module]] = {
    "base": lambda base, experts, fields: base,
    "expert": single_expert,
    "mixture": mixture,
    "merge": merge,
    "arrow": arrow,
    "xlora": xlora,
    "width": wide_lora,
}
"""Method kind → function of (base, experts, fields) that builds its model."""


class MethodBuilder:
    """Builds, fits and trains methods on one base with one set of texts.

    Args:
        settings: the settings of the bake-off.
        texts: its samples.
        tokenizer: the base's tokenizer.
        out: folder for the trainers' own files.
    """

    def __init__(self, settings: Settings, texts: Texts, tokenizer: Any, out: Path) -> None:
        self.settings, self.texts, self.tokenizer, self.out = settings, texts, tokenizer, out
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def base(self) -> nn.Module:
        """Load a fresh copy of the base."""
        model: Any = AutoModelForCausalLM.from_pretrained(self.settings.base, dtype=self.settings.dtype)
        on_device: nn.Module = model.to(self.device)
        return on_device

    def build(self, method: Method, seed: int) -> tuple[nn.Module, Cost]:
        """Build, fit and train a method's model.

        Returns:
            The finished model in evaluation mode, and its cost.

        Raises:
            PeftMoeError, ValueError and others: the method cannot be built with these experts.
        """
        base = self.base()
        set_seed(seed)
        start, losses = time.perf_counter(), []
        model = BUILDERS[method.kind](base, self.settings.experts, method.fields).to(self.device)
        if method.fit is not None:
            self._fit(model, method.fit)
        if method.train:
            losses = self._train(model, method, seed)
        # Count after training: a trainer may freeze or unfreeze parameters when it takes the model.
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        seconds = time.perf_counter() - start
        return model.eval(), Cost(
            trainable=count if method.train or method.fit else 0, seconds=seconds, losses=losses
        )

    def _fit(self, model: Any, arguments: Mapping[str, Any]) -> None:
        config = model.peft_config[model.active_adapter]
        # Without a null expert no router column stands for samples of other domains, so these are left out.
        rows = [s for s in self.texts.train if config.null_expert or s["domain"] in self.settings.experts]
        fit_router(model, rows, self.tokenizer, progress=False, **arguments)

    def _train(self, model: nn.Module, method: Method, seed: int) -> list[float]:
        from .training import train

        plan, width = self.settings.train, self.settings.width
        samples = self.texts.train
        if method.own_budget:
            # Draw only what the training reads: tokenizing the whole pool takes longer than a short training.
            count = min(len(self.texts.pool), width.steps * width.batch_size)
            samples = random.Random(seed).sample(self.texts.pool, count)
        budget = width if method.own_budget else plan
        learning_rate = width.learning_rate if method.kind == "width" else plan.learning_rate
        return train(
            model,
            method.kind,
            samples,
            self.tokenizer,
            steps=budget.steps,
            batch_size=budget.batch_size,
            learning_rate=method.learning_rate or learning_rate,
            max_length=plan.max_length,
            bf16=plan.bf16,
            robust=method.robust,
            seed=seed,
            out=self.out,
        )
