"""Combinations of fields that a ``MoLoraConfig`` refuses: they cannot work, or a field has no effect."""

from __future__ import annotations

import warnings

from ...errors import PeftMoeError, near_matches
from ...routers import RouterSettings, Scorer
from .fields import MixtureFields
from .loss_rules import check_losses, check_selection
from .routing import DEFAULTS


def check_shared(config: MixtureFields) -> None:
    """The names in ``shared_experts``, before anything counts columns.

    Raises:
        PeftMoeError: an unknown or repeated name, or no expert left to route.
    """
    names, shared = config.expert_names, list(config.shared_experts)
    for name in shared:
        if name not in names:
            raise PeftMoeError(f"shared_experts={shared}: {name!r} is no expert.{near_matches(name, names)}")
        if shared.count(name) > 1:
            raise PeftMoeError(
                f"shared_experts={shared}: {name!r} is given {shared.count(name)} times; once is enough"
            )
    if len(shared) == len(names):
        raise PeftMoeError(
            f"shared_experts={shared} leaves no expert to route; leave one out, or use router='sum' without "
            "shared experts"
        )


def check_routing(config: MixtureFields, settings: RouterSettings, scorer: type[Scorer]) -> None:
    """Combinations of resolved routing fields.

    Raises:
        PeftMoeError: the combination cannot work, or one of its fields would have no effect.
    """
    for name in ("top_k", "top_k_per_layer"):
        value = getattr(config, name)
        if value is not None and max([value] if name == "top_k" else value) > settings.num_columns:
            null = " (the null expert is one of them)" if settings.null_expert else ""
            raise PeftMoeError(
                f"{name}={value} exceeds the {settings.num_columns} experts{null}; lower it or add experts"
            )
    if not scorer.reads_input:
        _check_constant(config, settings, scorer)
    if scorer.reads_experts and config.router_scope != "module":
        raise PeftMoeError(
            f"router={config.router!r} reads the experts of one layer, so that router_scope must be "
            f"'module', not {config.router_scope!r}"
        )
    if scorer.reads_experts and config.mixing == "block":
        raise PeftMoeError(
            f"router={config.router!r} reads the experts of one layer, and mixing='block' decides for "
            "several; use mixing='linear', or router='linear'"
        )
    check_selection(config, settings)
    _check_idle(config, settings, scorer)
    sparse = settings.is_sparse
    if settings.straight_through and not sparse:
        raise PeftMoeError("straight_through=True has no effect on dense gates; set top_k")
    if sparse and settings.topk_method == "greedy":
        _check_sparse(config, settings, scorer)
    check_losses(config, settings, scorer)
    _check_fresh(config)
    if settings.num_columns == 1 and scorer.trainable and settings.norm_topk_prob:
        warnings.warn("one expert and no null expert: the gate is always 1, nothing to train", stacklevel=4)


def _check_constant(config: MixtureFields, settings: RouterSettings, scorer: type[Scorer]) -> None:
    idle = {
        _top_k_name(config): settings.top_k is not None,
        "topk_method": settings.topk_method != "greedy",
        # One set of learnt weights for the whole model is a choice; equal gates are equal everywhere.
        "router_scope": config.router_scope != "module" and not scorer.trainable,
        "router_granularity": settings.granularity != "token",
        "router_tap": config.router_tap is not None,
        "router_below_tap": config.router_below_tap != "probe",
        "router_input_norm": settings.input_norm,
        "router_init_std": settings.init_std != 0 and not scorer.trainable,
        # Equal scores stay equal.
        "router_temperature": settings.temperature != 1
        and not scorer.trainable
        and settings.scoring_func == "softmax",
    }
    for name, is_set in idle.items():
        if is_set:
            raise PeftMoeError(
                f"{name}={getattr(config, name)!r} has no effect with router={config.router!r}, whose gates "
                "do not depend on the input; leave it out or choose router='linear'"
            )


def _check_idle(config: MixtureFields, settings: RouterSettings, scorer: type[Scorer]) -> None:
    away_from_model = f"router_scope={config.router_scope!r}; set router_scope='model'"
    if config.router_below_tap == "prompt" and settings.granularity != "token":
        raise PeftMoeError(
            f"router_below_tap='prompt' has no effect with router_granularity={settings.granularity!r}, "
            "where all layers follow the prompt; use 'probe'"
        )
    blind = f"router={config.router!r}, which reads no hidden states; leave it out"
    reads_hidden = scorer.reads_input and scorer.reads_hidden
    fixed = scorer.reads_input and not (scorer.reads_hidden or scorer.trainable or scorer.draws)
    one_hot = f"router={config.router!r}, which chooses one expert by itself; leave it out"
    idle = {
        "router_tap": (config.router_tap is not None and config.router_scope != "model", away_from_model),
        "router_below_tap": (
            config.router_below_tap != "probe" and config.router_scope != "model",
            away_from_model,
        ),
        "router_pool": (
            settings.pool != "mean" and settings.granularity == "token",
            "router_granularity='token'; set router_granularity='sequence'",
        ),
        "router_window": (
            settings.window != DEFAULTS["router_window"] and settings.granularity != "running",
            f"router_granularity={settings.granularity!r}; set router_granularity='running'",
        ),
        "router_granularity": (settings.granularity != "token" and not reads_hidden, blind),
        "top_k": (fixed and config.top_k is not None, one_hot),
        "top_k_per_layer": (fixed and config.top_k_per_layer is not None, one_hot),
        "router_temperature": (fixed and settings.temperature != 1, one_hot),
        "router_hidden_size": (
            settings.hidden_size != DEFAULTS["router_hidden_size"] and not scorer.hidden_layer,
            f"router={config.router!r}, which has no hidden layer; leave it out or choose router='mlp'",
        ),
        "topk_method": (
            settings.topk_method == "expert_choice" and settings.granularity != "token",
            f"router_granularity={settings.granularity!r}, where experts have no tokens to choose among; use "
            "router_granularity='token'",
        ),
        "router_input_norm": (settings.input_norm and not reads_hidden, blind),
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


def _check_fresh(config: MixtureFields) -> None:
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


def _top_k_name(config: MixtureFields) -> str:
    return "top_k_per_layer" if config.top_k_per_layer else "top_k"


def _check_sparse(config: MixtureFields, settings: RouterSettings, scorer: type[Scorer]) -> None:
    name = _top_k_name(config)
    constant = settings.top_k == 1 and settings.norm_topk_prob and not settings.straight_through
    if constant and scorer.trainable and config.router_label_loss_coef == 0:
        raise PeftMoeError(
            f"{name}={getattr(config, name)} with norm_topk_prob=True makes every gate exactly 1 where one "
            "expert is kept, so the router gets no gradient from the language model's loss; set "
            "straight_through=True, or norm_topk_prob=False (Switch)"
        )
    if settings.init_std == 0 and not settings.straight_through:
        warnings.warn(
            f"router_init_std=0 with {name}={getattr(config, name)}: all scores tie at the start, and the "
            "same experts win every tie; leave router_init_std out for small random weights",
            stacklevel=5,
        )
