"""What a ``MoLoraConfig`` refuses, and why: fields first, then combinations that cannot have an effect."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

from .errors import PeftMoeError, near_matches
from .routers import SCORING_FUNCS, RouterSettings, Scorer
from .routers.pooling import POOLS

if TYPE_CHECKING:
    from .config import MoLoraConfig

_CHOICES: dict[str, tuple[str, ...]] = {
    "router_scope": ("module", "block", "model"),
    "router_below_tap": ("probe", "base"),
    "router_granularity": ("token", "sequence"),
    "router_pool": POOLS,
    "scoring_func": tuple(SCORING_FUNCS),
}
_COEFFICIENTS = ("router_aux_loss_coef", "router_z_loss_coef", "router_label_loss_coef")


def check_fields(config: MoLoraConfig) -> None:
    """Each field by itself: types, ranges, names.

    Raises:
        PeftMoeError: naming the field, its value and the fix.
    """
    _check_experts(config.experts)
    for name, options in _CHOICES.items():
        value = getattr(config, name)
        if value is not None and value not in options:
            raise PeftMoeError(f"{name}={value!r} is not known.{near_matches(str(value), options)}")
    _check_positive_int("r", config.r)
    _check_positive("lora_alpha", config.lora_alpha)
    if config.top_k is not None:
        _check_positive_int("top_k", config.top_k)
    if config.router_temperature is not None:
        _check_positive("router_temperature", config.router_temperature)
    for name in (*_COEFFICIENTS, "router_init_std"):
        value = getattr(config, name)
        if value is not None and not (_is_number(value) and value >= 0):
            raise PeftMoeError(f"{name}={value!r} must be a finite number ≥ 0; 0 switches it off")
    tap = config.router_tap
    if tap is not None and (isinstance(tap, bool) or not isinstance(tap, int | str)):
        raise PeftMoeError(f"router_tap={tap!r} must be a layer's index or a module's name")
    if config.bias != "none":
        raise PeftMoeError(
            f"bias={config.bias!r}: a trained bias cannot be gated per token; only 'none' is possible"
        )


def _check_experts(experts: Any) -> None:
    if isinstance(experts, bool) or not isinstance(experts, int | dict | list):
        raise PeftMoeError(
            f"experts={experts!r}: give a dict of names and adapter folders, a list of folders, or a "
            "number of fresh experts"
        )
    count = experts if isinstance(experts, int) else len(experts)
    if count < 1:
        raise PeftMoeError(f"experts={experts!r}: a mixture needs at least one expert; add one")
    if isinstance(experts, dict):
        for name, source in experts.items():
            if not isinstance(name, str) or not isinstance(source, str) or not source:
                raise PeftMoeError(
                    f"experts[{name!r}]={source!r}: names and sources must be text; "
                    "give the adapter's folder or Hub id"
                )
    if isinstance(experts, list):
        _check_expert_list(experts)


def _check_expert_list(experts: list[Any]) -> None:
    if all(isinstance(entry, dict) for entry in experts):
        names = [entry.get("name") for entry in experts]
    elif all(isinstance(entry, str) and entry for entry in experts):
        names = [entry.rstrip("/").split("/")[-1].split("@")[0] for entry in experts]
    else:
        raise PeftMoeError(f"experts={experts!r}: a list must hold adapter folders or Hub ids, all as text")
    for name in names:
        if not name or names.count(name) > 1:
            raise PeftMoeError(
                f"experts: the name {name!r} is missing or given {names.count(name)} times; "
                "give a dict with a name for each"
            )


def check_routing(config: MoLoraConfig, settings: RouterSettings, scorer: type[Scorer]) -> None:
    """Combinations of resolved routing fields.

    Raises:
        PeftMoeError: the combination cannot work, or one of its fields would have no effect.
    """
    if settings.top_k is not None and settings.top_k > settings.num_columns:
        raise PeftMoeError(
            f"top_k={settings.top_k} exceeds the {settings.num_columns} experts; lower `top_k` or add experts"
        )
    if not scorer.reads_input:
        _check_constant(config, settings)
    if settings.granularity == "sequence" and config.router_scope != "model":
        raise PeftMoeError(
            f"router_granularity='sequence' needs router_scope='model', not {config.router_scope!r}: "
            "only a decision for the whole model is kept in the KV cache"
        )
    if config.router_tap is not None and config.router_scope != "model":
        raise PeftMoeError(
            f"router_tap={config.router_tap!r} has no effect with router_scope={config.router_scope!r}; "
            "set router_scope='model'"
        )
    sparse = settings.top_k is not None and settings.top_k < settings.num_columns
    if settings.straight_through and not sparse:
        raise PeftMoeError("straight_through=True has no effect on dense gates; set top_k")
    if sparse and scorer.trainable:
        _check_trainable_top_k(config, settings)
    _check_losses(config, settings, scorer, sparse)
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


def _check_trainable_top_k(config: MoLoraConfig, settings: RouterSettings) -> None:
    constant = settings.top_k == 1 and settings.norm_topk_prob and not settings.straight_through
    if constant and config.router_label_loss_coef == 0:
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


def _check_losses(
    config: MoLoraConfig, settings: RouterSettings, scorer: type[Scorer], sparse: bool
) -> None:
    active = [name for name in _COEFFICIENTS if getattr(config, name) > 0]
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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_positive(name: str, value: Any) -> None:
    if not _is_number(value) or value <= 0:
        raise PeftMoeError(f"{name}={value!r} must be a finite number > 0")


def _check_positive_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PeftMoeError(f"{name}={value!r} must be a whole number ≥ 1")
