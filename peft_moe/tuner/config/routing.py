"""The fields of a ``MoLoraConfig`` that say how it routes, and how presets fill them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...errors import PeftMoeError, near_matches
from ...routers import PRESETS, RECOMMENDED, RouterSettings, Scorer, available_scorers, scorer_class

# What a field is where neither the user nor the preset says.
DEFAULTS: dict[str, Any] = {
    "router_scope": "module",
    "router_granularity": "token",
    "router_pool": "mean",
    "router_window": 12.0,
    "router_below_tap": "probe",
    "router_input_norm": False,
    "router_temperature": 1.0,
    "router_hidden_size": 64,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "top_p": None,
    "top_k": None,
    "norm_topk_prob": True,
    "straight_through": False,
    "null_expert": False,
    "router_tap": None,
    "router_bias_update_rate": 0.0,
    "experts_per_layer": None,
    "router_aux_loss_coef": 0.0,
    "router_l1_coef": 0.0,
    "router_l1_target": None,
}
# Of these only gates that leave experts out make use.
_OF_SPARSE_GATES = ("straight_through", "router_bias_update_rate", "router_aux_loss_coef")


@dataclass
class RoutingFields:
    """How a mixture routes. Fields left at None take the preset's value.

    Args:
        router: a preset or a registered scorer, which ``peft-moe routers`` lists; or "auto", the one that
            is recommended today.
        router_scope: who shares a decision: "module" (each linear layer decides for itself), "block"
            (the layers of one attention or feed-forward module share what its first one decides), or
            "model" (one decision for all layers, taken where the tap is).
        router_tap: for scope "model": the decoder layer whose input is read, an index or a module
            name. Default: the middle layer. 0 reads the embeddings.
        router_below_tap: for scope "model", what the layers below the tap do. "probe": the bare base
            first runs up to the tap, then all layers are adapted; it costs tap/layers of a prefill
            for a decision per prompt, and as much of every decoding step for one per token. "base":
            those layers stay unadapted, and the tap is read in the same pass, at no cost. "prompt", for
            decisions per token: those layers follow the prompt's pooled decision, from a probe at
            prefill only, and the tap is read in the same pass.
        router_granularity: "token"; "sequence": one decision per prompt; or "running": a decision that
            starts from the prompt and follows a running mean of the text behind it.
        router_window: half-life of that mean, in tokens.
        router_pool: how a prompt is summarised for it: "mean" or "last" token.
        router_input_norm: divide the router's input by its root mean square.
        router_temperature: what scores are divided by; below 1 sharpens.
        router_hidden_size: of scorers with a hidden layer.
        router_init_std: of the scorer's weights. Default 0 (all experts alike); 0.02 where top-k
            would otherwise be decided by ties for ever.
        scoring_func: "softmax", "sigmoid", "relu" (ReMoE) or "none" (the scores are the weights).
        topk_method: "greedy"; "top_p" (the fewest experts that reach the mass ``top_p``); or
            "expert_choice" (each expert takes its ⌈top_k·T/E⌉ best tokens; encoders only).
        top_k: experts per decision; None mixes all (dense) unless the preset says otherwise.
        top_p: probability mass kept by topk_method="top_p".
        norm_topk_prob: divide the kept weights by their sum, so that they sum to 1.
        routed_scaling_factor: what the routed experts' weights are multiplied by.
        straight_through: gates as top-k forward, dense gradients backward.
        null_expert: a further choice that adds nothing: the base alone.
        shared_experts: names of experts that are always on, with weight 1; the others are routed.
        experts_per_layer: how many of the fresh experts each group of layers has, from the first layers
            to the last (MoLA); the groups are of equal size.
        top_k_per_layer: the same for ``top_k``.
        router_bias_update_rate: step of DeepSeek-V3's balancing bias, which joins the choice of the top
            k, not the gates; a trainer of :mod:`peft_moe.training` moves it. 0: no bias.
        router_aux_loss_coef: weight of the load balancing loss, per layer (Switch, Mixtral).
        router_z_loss_coef: of the z-loss (ST-MoE).
        router_entropy_coef: of the decisions' mean entropy; above 0 sharpens, below 0 flattens.
        router_label_loss_coef: of the cross-entropy with each sample's ``domain``.
        router_lbc_coef: of LoRAMoE's localised balancing constraint.
        router_lbc_delta: δ of it: an expert of the sample's own domain is to weigh (1+δ)/(1−δ) times
            what each other one weighs.
        router_l1_coef: of the mean of the gates (ReMoE).
        router_l1_target: share of zero gates to steer towards, by raising and lowering the L1 weight;
            None keeps it.
        loss_coefs: weights of further losses on decisions, by the name under which
            :func:`peft_moe.register_loss` registered each.
        expert_orthogonality_coef: of the mean squared cosine between the A factors of different
            experts; only where experts train.
        distillation_coef: β of β·T²·KL(teacher ‖ mixture) on completion tokens; the teacher is the one
            that the trainer was given, else each sample's own expert.
        distillation_temperature: T.
        distillation_adaptive: multiply the language model's loss and the distillation by two factors, 1
            and 1 at first, that follow how much each has still to fall.
    """

    router: str = "linear"
    router_scope: str | None = None
    router_tap: int | str | None = None
    router_below_tap: str | None = None
    router_granularity: str | None = None
    router_pool: str | None = None
    router_window: float | None = None
    router_input_norm: bool | None = None
    router_temperature: float | None = None
    router_hidden_size: int | None = None
    router_init_std: float | None = None
    scoring_func: str | None = None
    topk_method: str | None = None
    top_k: int | None = None
    top_p: float | None = None
    norm_topk_prob: bool | None = None
    routed_scaling_factor: float = 1.0
    straight_through: bool | None = None
    null_expert: bool | None = None
    shared_experts: list[str] = field(default_factory=list)
    experts_per_layer: list[int] | None = None
    top_k_per_layer: list[int] | None = None
    router_bias_update_rate: float | None = None
    router_aux_loss_coef: float | None = None
    router_z_loss_coef: float = 0.0
    router_entropy_coef: float = 0.0
    router_label_loss_coef: float = 0.0
    router_lbc_coef: float = 0.0
    router_lbc_delta: float = 0.1
    router_l1_coef: float | None = None
    router_l1_target: float | None = None
    loss_coefs: dict[str, float] = field(default_factory=dict)
    expert_orthogonality_coef: float = 0.0
    distillation_coef: float = 0.0
    distillation_temperature: float = 1.0
    distillation_adaptive: bool = False

    @property
    def num_experts(self) -> int:
        """E."""
        raise NotImplementedError

    @property
    def expert_names(self) -> list[str]:
        """Names in the mixture's order: the order of the gates."""
        raise NotImplementedError

    @property
    def routed_names(self) -> list[str]:
        """Names of the router's columns but the null expert's."""
        return [name for name in self.expert_names if name not in self.shared_experts]

    @property
    def scorer(self) -> type[Scorer]:
        """The class that scores, found from ``router``."""
        return scorer_class(self._scorer_name())

    def _scorer_name(self) -> str:
        return str(PRESETS[self.router].fields["scorer"]) if self.router in PRESETS else self.router

    def fill_from_preset(self) -> None:
        """Give every open field its value.

        Raises:
            PeftMoeError: there is no such router.
        """
        if self.router == "auto":
            self.router = RECOMMENDED  # so that what is saved says what it is
        known = {"auto", *PRESETS, *available_scorers()}
        if self.router not in known:
            raise PeftMoeError(f"router={self.router!r} is not known.{near_matches(self.router, known)}")
        preset = PRESETS[self.router].fields if self.router in PRESETS else {}
        own_top_k = self.top_k
        open_fields = [name for name in _OF_SPARSE_GATES if getattr(self, name) is None]
        for name, default in {**DEFAULTS, "router_init_std": None}.items():
            if getattr(self, name) is None:
                setattr(self, name, preset.get(name, default))
        if own_top_k is None and self.top_k is not None:
            # A preset's own top_k also serves mixtures of fewer experts than that.
            self.top_k = min(self.top_k, max(1, len(self.routed_names) + bool(self.null_expert)))
        if self.experts_per_layer is not None and "experts_per_layer" in preset:
            self.experts_per_layer = [min(count, self.num_experts) for count in self.experts_per_layer]
        if not self._is_sparse():
            # Nor does it insist on what would have no effect on so few experts.
            for name in open_fields:
                setattr(self, name, DEFAULTS[name])
        if self.router_init_std is None:
            self.router_init_std = 0.02 if self._ties_starve() else 0.0

    def _is_sparse(self) -> bool:
        columns = len(self.routed_names) + bool(self.null_expert)
        top_k = self.smallest_top_k
        return (top_k is not None and top_k < columns) or self.topk_method != "greedy"

    def _ties_starve(self) -> bool:
        dead = self.scoring_func == "relu"  # at zero its gates and their gradients are zero
        return (self._is_sparse() or dead) and not self.straight_through and self.scorer.reads_input

    @property
    def smallest_top_k(self) -> int | None:
        """``top_k`` of the layer that keeps the fewest columns."""
        return min(self.top_k_per_layer) if self.top_k_per_layer else self.top_k

    def router_settings(self, *, present: int | None = None, top_k: int | None = None) -> RouterSettings:
        """The routing fields, resolved.

        Args:
            present: number of experts in the layer at hand, where ``experts_per_layer`` says so.
            top_k: of the layer at hand, where ``top_k_per_layer`` says so.
        """
        names = self.expert_names
        return RouterSettings(
            scorer=self._scorer_name(),
            num_experts=self.num_experts,
            shared=tuple(names.index(name) for name in self.shared_experts),
            null_expert=bool(self.null_expert),
            present=present,
            top_k=top_k if top_k is not None else self.top_k,
            topk_method=str(self.topk_method),
            top_p=self.top_p,
            scoring_func=str(self.scoring_func),
            norm_topk_prob=bool(self.norm_topk_prob),
            straight_through=bool(self.straight_through),
            temperature=float(self.router_temperature or 0.0),
            scaling_factor=float(self.routed_scaling_factor),
            bias_update_rate=float(self.router_bias_update_rate or 0.0),
            granularity=str(self.router_granularity),
            pool=str(self.router_pool),
            window=float(self.router_window or 1.0),
            input_norm=bool(self.router_input_norm),
            hidden_size=int(self.router_hidden_size or 1),
            init_std=float(self.router_init_std or 0.0),
        )
