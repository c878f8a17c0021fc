"""Combinations of fields that a ``MoLoraConfig`` refuses: they cannot work, or a field has no effect."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from .errors import PeftMoeError
from .field_checks import COEFFICIENTS
from .routers import RouterSettings, Scorer

if TYPE_CHECKING:
    from .config import MoLoraConfig


def check_routing(config: MoLoraConfig, settings: RouterSettings, scorer: type[Scorer]) -> None:
    """Combinations of resolved routing fields.

    Raises:
        PeftMoeError: the combination cannot work, or one of its fields would have no effect.
    """
    if settings.top_k is not None and settings.top_k > settings.num_columns:
        null = " (the null expert is one of them)" if settings.null_expert else ""
        raise PeftMoeError(
            f"top_k={settings.top_k} exceeds the {settings.num_columns} experts{null}; "
            "lower `top_k` or add experts"
        )
    if not scorer.reads_input:
        _check_constant(config, settings)
    if settings.granularity == "sequence" and config.router_scope != "model":
        raise PeftMoeError(
            f"router_granularity='sequence' needs router_scope='model', not {config.router_scope!r}: "
            "only a decision for the whole model is kept in the KV cache"
        )
    _check_idle(config, settings)
    sparse = settings.top_k is not None and settings.top_k < settings.num_columns
    if settings.straight_through and not sparse:
        raise PeftMoeError("straight_through=True has no effect on dense gates; set top_k")
    if sparse:
        _check_sparse(config, settings, scorer)
    _check_losses(config, settings, scorer, sparse)
    _check_fresh(config)
    if settings.num_columns == 1 and scorer.trainable:
        warnings.warn("one expert and no null expert: the gate is always 1, nothing to train", stacklevel=4)


def _check_constant(config: MoLoraConfig, settings: RouterSettings) -> None:
    idle = {
        "top_k": settings.top_k is not None,
        "router_scope": config.router_scope != "module",
        "router_input_norm": settings.input_norm,
        "router_init_std": settings.init_std != 0,
    }
    for name, is_set in idle.items():
        if is_set:
            raise PeftMoeError(
                f"{name}={getattr(config, name)!r} has no effect with router={config.router!r}, whose gates "
                "do not depend on the input; leave it out or choose router='linear'"
            )


def _check_idle(config: MoLoraConfig, settings: RouterSettings) -> None:
    away_from_model = f"router_scope={config.router_scope!r}; set router_scope='model'"
    idle = {
        "router_tap": (config.router_tap is not None and config.router_scope != "model", away_from_model),
        "router_below_tap": (
            config.router_below_tap != "probe" and config.router_scope != "model",
            away_from_model,
        ),
        "router_pool": (
            settings.pool != "mean" and settings.granularity != "sequence",
            "router_granularity='token'; set router_granularity='sequence'",
        ),
        # PEFT looks at layer numbers only where it matches names.
        "layers_to_transform": (
            config.layers_to_transform is not None
            and isinstance(config.target_modules, str)
            and config.target_modules != "all-linear",
            "a regex in target_modules; select the layers in the regex",
        ),
        "layers_pattern": (
            bool(config.layers_pattern) and config.layers_to_transform is None,
            "layers_to_transform=None; set layers_to_transform",
        ),
    }
    for name, (is_idle, reason) in idle.items():
        if is_idle:
            raise PeftMoeError(f"{name}={getattr(config, name)!r} has no effect with {reason}")


def _check_fresh(config: MoLoraConfig) -> None:
    if config.sources():
        for name in ("r", "lora_alpha", "use_rslora", "init_weights"):
            if getattr(config, name) != type(config).__dataclass_fields__[name].default:
                raise PeftMoeError(
                    f"{name}={getattr(config, name)!r} has no effect on trained adapters, which bring their "
                    "own; leave it out"
                )
    elif isinstance(config.experts, int) and config.init_weights and config.train_experts is False:
        warnings.warn(
            "train_experts=False with fresh experts: they start as zero and stay so, hence the mixture stays "
            "the base; leave train_experts out",
            stacklevel=5,
        )


def _check_sparse(config: MoLoraConfig, settings: RouterSettings, scorer: type[Scorer]) -> None:
    constant = settings.top_k == 1 and settings.norm_topk_prob and not settings.straight_through
    if constant and scorer.trainable and config.router_label_loss_coef == 0:
        raise PeftMoeError(
            "top_k=1 with norm_topk_prob=True makes every gate exactly 1, so the router gets no gradient "
            "from the language model's loss; set straight_through=True, or norm_topk_prob=False (Switch)"
        )
    if settings.init_std == 0 and not settings.straight_through:
        warnings.warn(
            f"router_init_std=0 with top_k={settings.top_k}: all scores tie at the start, and the same "
            "experts win every tie; leave router_init_std out for small random weights",
            stacklevel=5,
        )


def _check_losses(config: MoLoraConfig, settings: RouterSettings, scorer: type[Scorer], sparse: bool) -> None:
    active = [name for name in COEFFICIENTS if getattr(config, name) > 0]
    if active and not scorer.trainable:
        raise PeftMoeError(
            f"{active[0]}={getattr(config, active[0])} has no effect: router={config.router!r} does not train"
        )
    if config.router_aux_loss_coef > 0 and not sparse:
        raise PeftMoeError(
            f"router_aux_loss_coef={config.router_aux_loss_coef} has no effect on dense gates (every expert "
            "is always selected, so the loss is constant); set top_k below the number of experts"
        )
    if config.router_z_loss_coef > 0 and settings.scoring_func != "softmax":
        raise PeftMoeError(
            f"router_z_loss_coef={config.router_z_loss_coef} is made for softmax scores, not "
            f"scoring_func={settings.scoring_func!r}; set it to 0"
        )
