"""Combinations of a ``MoLoraConfig`` that concern selections, layers and losses."""

from __future__ import annotations

from ...errors import PeftMoeError
from ...routers import RouterSettings, Scorer
from ...routers.losses import LOSSES, active_losses, check_loss_names
from .fields import MixtureFields


def check_selection(config: MixtureFields, settings: RouterSettings) -> None:
    """How weights are chosen, and how that changes with depth.

    Raises:
        PeftMoeError: the combination cannot work, or one of its fields would have no effect.
    """
    if settings.scoring_func == "none" and settings.norm_topk_prob:
        raise PeftMoeError(
            "scoring_func='none' with norm_topk_prob=True divides by a sum that may be zero or negative; set "
            "norm_topk_prob=False"
        )
    if (settings.top_p is not None) != (settings.topk_method == "top_p"):
        raise PeftMoeError(
            f"top_p={settings.top_p} with topk_method={settings.topk_method!r}: topk_method='top_p' and a "
            "value of `top_p` belong together; set both or neither"
        )
    if settings.topk_method == "top_p" and settings.scoring_func != "softmax":
        raise PeftMoeError(
            f"topk_method='top_p' adds up probabilities, which scoring_func={settings.scoring_func!r} does "
            "not give; use 'softmax'"
        )
    if settings.topk_method == "top_p" and settings.top_k is not None:
        name = "top_k_per_layer" if config.top_k_per_layer else "top_k"
        raise PeftMoeError(
            f"{name}={getattr(config, name)} has no effect with topk_method='top_p'; leave it out"
        )
    if settings.topk_method == "expert_choice" and settings.top_k is None:
        raise PeftMoeError(
            "topk_method='expert_choice' needs top_k: how many experts a token gets on average"
        )
    if settings.topk_method == "expert_choice" and str(config.task_type or "").endswith("CAUSAL_LM"):
        raise PeftMoeError(
            "topk_method='expert_choice' looks at the whole sequence, so that a causal model would see its "
            "own future; use topk_method='greedy', or an encoder"
        )
    if settings.bias_update_rate > 0 and not (settings.is_sparse and settings.topk_method == "greedy"):
        raise PeftMoeError(
            f"router_bias_update_rate={settings.bias_update_rate} has no effect: the bias balances the "
            "choice of the top k, and every expert is chosen here; set top_k"
        )
    _check_depth(config, settings)


def _check_depth(config: MixtureFields, settings: RouterSettings) -> None:
    counts = config.experts_per_layer
    for name in ("experts_per_layer", "top_k_per_layer"):
        if getattr(config, name) is not None and config.router_scope == "model":
            raise PeftMoeError(
                f"{name}={getattr(config, name)} needs a decision per layer, and router_scope='model' takes "
                "one for all; use router_scope='module'"
            )
    if counts is not None:
        if config.sources():
            raise PeftMoeError(
                f"experts_per_layer={counts} is for fresh experts; trained adapters say themselves which "
                "layers they adapt. Leave it out"
            )
        if max(counts) != settings.num_experts:
            raise PeftMoeError(
                f"experts_per_layer={counts} has a maximum of {max(counts)}, and "
                f"experts={settings.num_experts}; make them agree"
            )
        if settings.shared:
            raise PeftMoeError("experts_per_layer cannot be combined with shared_experts; leave one out")
    if config.top_k_per_layer is not None and config.top_k is not None and config.router != "mola":
        raise PeftMoeError(
            f"top_k={config.top_k} has no effect beside "
            f"top_k_per_layer={config.top_k_per_layer}; leave one out"
        )


def check_losses(config: MixtureFields, settings: RouterSettings, scorer: type[Scorer]) -> None:
    """Weights of losses that could not do anything.

    Raises:
        PeftMoeError: naming the weight and the reason.
    """
    if not config.inference_mode:  # a saved mixture answers without the losses of its training
        check_loss_names(config.loss_coefs)
    active = [LOSSES[name] for name in active_losses(config)]
    if active and not scorer.trainable:
        raise PeftMoeError(
            f"{active[0].describe(config)} has no effect: router={config.router!r} does not train"
        )
    for loss in active:
        reason = loss.objection(settings) if loss.objection is not None else None
        if reason is not None:
            raise PeftMoeError(f"{loss.describe(config)} {reason}")
    if config.expert_orthogonality_coef > 0 and not config.experts_train:
        raise PeftMoeError(
            f"expert_orthogonality_coef={config.expert_orthogonality_coef} has no effect on frozen experts; "
            "set it to 0"
        )
    if settings.scoring_func == "relu" and settings.norm_topk_prob:
        raise PeftMoeError(
            "scoring_func='relu' with norm_topk_prob=True undoes the sparsity that ReLU gates learn; set "
            "norm_topk_prob=False"
        )
    dependent = {
        "router_l1_target": ("router_l1_coef", None),
        **{
            name: (loss.key, type(config).__dataclass_fields__[name].default)
            for loss in LOSSES.values()
            if loss.has_field
            for name in loss.options.values()
        },
        "distillation_temperature": ("distillation_coef", 1.0),
        "distillation_adaptive": ("distillation_coef", False),
    }
    for name, (needed, default) in dependent.items():
        if getattr(config, name) != default and not getattr(config, needed):
            raise PeftMoeError(f"{name}={getattr(config, name)} has no effect with {needed}=0; set {needed}")
