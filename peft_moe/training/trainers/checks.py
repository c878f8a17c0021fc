"""Checks before the first step: the right parameters train, in float32, and every loss has an effect."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ...errors import PeftMoeError
from ...routers import Router
from ...routers.losses import active_losses
from ...routing.checkpointing import uses_reentrant
from ...tuner.config.mixture import MoLoraConfig

# A router is small and starts near zero: 300 steps at 1e-4 hardly change it.
_SLOW = 5e-4


def mixture_config(model: nn.Module) -> tuple[str, MoLoraConfig]:
    """Return adapter name and config of a PeftModel's active mixture.

    Raises:
        PeftMoeError: the model has no active mixture.
    """
    for adapter in model.active_adapters if isinstance(model, PeftModel) else []:
        config = model.peft_config[adapter]  # type: ignore[index]
        if isinstance(config, MoLoraConfig):
            return adapter, config
    raise PeftMoeError(
        f"{type(model).__name__} carries no active mixture; pass peft_config=MoLoraConfig(…) or a model from "
        "get_peft_model(model, MoLoraConfig(…))"
    )


def trainable_names(model: nn.Module) -> list[str]:
    """Return the names of all parameters that would train."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def check_trainable(model: nn.Module, config: MoLoraConfig) -> None:
    """Check that only what the config names would train: routers, and experts or saved modules if it says so.

    Raises:
        PeftMoeError: another parameter would train, or none would.
    """
    names = trainable_names(model)
    allowed = [".molora_router."]
    if config.experts_train:
        allowed += [".molora_A.", ".molora_B."]
    if config.modules_to_save:
        allowed.append(".modules_to_save.")
    if config.trainable_token_indices:
        allowed.append(".token_adapter.")
    unexpected = [name for name in names if not any(part in name for part in allowed)]
    if unexpected:
        raise PeftMoeError(
            f"{len(unexpected)} parameters would train that should be frozen, such as {unexpected[0]}; build "
            "the model with get_peft_model() and leave requires_grad alone"
        )
    if not names:
        raise PeftMoeError(
            f"router={config.router!r} has nothing to train and the experts are frozen; choose "
            "router='linear' or 'context', or load the mixture with is_trainable=True"
        )


def check_checkpointing(model: nn.Module, config: MoLoraConfig) -> None:
    """Refuse reentrant gradient checkpointing where losses or load balancing need recorded decisions.

    Its first forward pass runs without gradients and its second one in the backward pass, so that no decision
    is recorded with gradients while the loss is computed.

    Raises:
        PeftMoeError: a loss or the load balancing would have no effect.
    """
    names = active_losses(config)
    if config.router_bias_update_rate:
        names.append("router_bias_update_rate")
    if names and uses_reentrant(model):
        raise PeftMoeError(
            f"{names[0]} would have no effect with "
            "gradient_checkpointing_kwargs={'use_reentrant': True}; set use_reentrant=False"
        )


def check_teacher(teacher: nn.Module | None, config: MoLoraConfig) -> None:
    """Refuse a teacher without distillation.

    Raises:
        PeftMoeError: a teacher is given, and ``distillation_coef`` is 0.
    """
    if teacher is not None and not config.distillation_coef:
        raise PeftMoeError(
            f"teacher={type(teacher).__name__} has no effect with distillation_coef=0; set it in MoLoraConfig"
        )


def refuse_distillation(trainer: Any, config: MoLoraConfig) -> None:
    """Refuse distillation in a trainer whose batches hold no labels.

    Raises:
        PeftMoeError: always.
    """
    raise PeftMoeError(
        f"distillation_coef={config.distillation_coef} has no effect in {type(trainer).__name__}, whose "
        "batches hold no labels; set it to 0, or distil with MoLoraSFTTrainer first"
    )


def router_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of all routers' weights, by name."""
    return {
        f"{name}.{key}": value.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, Router)
        for key, value in module.state_dict().items()
    }


def restore_router_precision(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Undo a cast of the routers to a lower precision than float32.

    TRL casts every trainable parameter of a 4-bit model to bf16, which rounds the steps of a small learning
    rate to zero.

    Args:
        model: the model whose routers are restored.
        before: the routers' weights before the cast, by name; a weight that is missing here is cast back.
    """
    for name, module in model.named_modules():
        if isinstance(module, Router):
            for key, parameter in module.named_parameters():
                if parameter.dtype != torch.float32:
                    exact = before.get(f"{name}.{key}")
                    parameter.data = parameter.data.float() if exact is None else exact.to(parameter.device)


def warn_slow_router(args: Any, config: MoLoraConfig) -> None:
    """Warn if only the router trains, at the learning rate of an adapter."""
    if args.learning_rate < _SLOW and not config.experts_train:
        warnings.warn(
            f"learning_rate={args.learning_rate} hardly moves a router; 5e-3 to 1e-2 is usual when nothing "
            "else trains",
            stacklevel=3,
        )
