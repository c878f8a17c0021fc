"""``MoLoraConfig``: everything a mixture is told, checked before any model or file is touched."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType

from .config_checks import check_routing
from .errors import PeftMoeError, near_matches
from .experts.spec import ExpertSpec
from .field_checks import check_fields
from .routers import PRESETS, RouterSettings, Scorer, available_scorers, scorer_class

FORMAT_VERSION = 1

_ROUTING_DEFAULTS: dict[str, Any] = {
    "router_scope": "module",
    "router_granularity": "token",
    "router_pool": "mean",
    "router_below_tap": "probe",
    "router_input_norm": False,
    "router_temperature": 1.0,
    "scoring_func": "softmax",
    "norm_topk_prob": True,
    "straight_through": False,
    "null_expert": False,
}


@dataclass
class MoLoraConfig(PeftConfig):
    """A gated mixture of LoRA experts in the linear layers of a frozen base.

    ``router`` is a preset or a registered scorer; fields left at None take the preset's value.

    Args:
        experts: where the experts come from. ``{"math": "path-or-hub-id", …}`` reads trained PEFT LoRA
            adapters (``"org/name@revision"`` pins a Hub revision); a list names them after their
            folders; a number makes that many fresh, trainable experts. In a loaded or injected
            config: the list of records that describe the embedded experts.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save,
            trainable_token_indices, bias: as in ``LoraConfig`` (``bias`` only "none"). With trained
            adapters ``target_modules`` may stay None: the union of what they adapt.
        r, lora_alpha, use_rslora, init_weights: of fresh experts only. ``init_weights=False`` starts
            B at random instead of zero (for tests).
        train_experts: whether the experts train as well. Default: fresh ones do, given ones do not.
        router: "uniform" (gate-less), "linear", "random", "context" (one hard decision per prompt,
            taken inside the base, which may choose no expert), or a name from ``register_router``.
        router_scope: who shares a decision: "module" (each linear layer decides for itself), "block"
            (the layers of one attention or feed-forward module share what its first one decides), or
            "model" (one decision for all layers, taken where the tap is).
        router_tap: for scope "model": the decoder layer whose input is read, an index or a module
            name. Default: the middle layer. 0 reads the embeddings.
        router_below_tap: for scope "model", what the layers below the tap do. "probe": the bare base
            first runs up to the tap, then all layers are adapted; it costs tap/layers of a prefill
            for a decision per prompt, and as much of every decoding step for one per token. "base":
            those layers stay unadapted, and the tap is read in the same pass, at no cost.
        router_granularity: "token", or "sequence": one decision per prompt (scope "model" only).
        router_pool: how a prompt is summarised for it: "mean" or "last" token.
        router_input_norm: divide the router's input by its root mean square.
        router_temperature: what scores are divided by; below 1 sharpens.
        router_init_std: of the scorer's weights. Default 0 (all experts alike); 0.02 where top-k
            would otherwise be decided by ties for ever.
        scoring_func: "softmax" or "sigmoid".
        top_k: experts per decision; None mixes all (dense) unless the preset says otherwise.
        norm_topk_prob: divide the kept weights by their sum, so that they sum to 1.
        straight_through: gates as top-k forward, dense gradients backward.
        null_expert: a further choice that adds nothing: the base alone.
        router_aux_loss_coef, router_z_loss_coef, router_label_loss_coef: weights of the load
            balancing loss, the z-loss, and the cross-entropy with each sample's ``domain``; a
            trainer of :mod:`peft_moe.training` adds them.
        allow_base_mismatch: accept adapters that name another base model.
        format_version: of the saved layout.

    Raises:
        PeftMoeError: a field or a combination that cannot work, with the value, the reason, the fix.
    """

    experts: dict[str, str] | list[Any] | int = 4
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    bias: str = "none"
    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    init_weights: bool = True
    train_experts: bool | None = None
    router: str = "linear"
    router_scope: str | None = None
    router_tap: int | str | None = None
    router_below_tap: str | None = None
    router_granularity: str | None = None
    router_pool: str | None = None
    router_input_norm: bool | None = None
    router_temperature: float | None = None
    router_init_std: float | None = None
    scoring_func: str | None = None
    top_k: int | None = None
    norm_topk_prob: bool | None = None
    straight_through: bool | None = None
    null_expert: bool | None = None
    router_aux_loss_coef: float = 0.0
    router_z_loss_coef: float = 0.0
    router_label_loss_coef: float = 0.0
    allow_base_mismatch: bool = False
    format_version: int = FORMAT_VERSION
    # PEFT's name matching asks for this attribute; targeting bare parameters is not offered.
    target_parameters: None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # PEFT's own
        # A member that the registration adds to PEFT's enum, which type checkers cannot see.
        self.peft_type = PeftType("MOLORA")
        check_fields(self)
        if self.format_version > FORMAT_VERSION:
            raise PeftMoeError(
                f"format_version={self.format_version} is newer than {FORMAT_VERSION}, the newest that "
                "this peft-moe reads; upgrade peft-moe"
            )
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list | tuple):
                setattr(self, name, set(getattr(self, name)))  # PEFT's habit
        self._fill_from_preset()
        check_routing(self, self.router_settings(), self.scorer)

    def _fill_from_preset(self) -> None:
        known = {*PRESETS, *available_scorers()}
        if self.router not in known:
            raise PeftMoeError(f"router={self.router!r} is not known.{near_matches(self.router, known)}")
        preset = PRESETS.get(self.router, {})
        for name in (*_ROUTING_DEFAULTS, "top_k", "router_init_std"):
            if getattr(self, name) is None:
                setattr(self, name, preset.get(name, _ROUTING_DEFAULTS.get(name)))
                if name == "top_k" and self.top_k is not None:
                    # A preset's own top_k also serves mixtures of fewer experts than that.
                    self.top_k = min(self.top_k, self.num_experts + bool(self.null_expert))
        if self.router_init_std is None:
            columns = self.num_experts + bool(self.null_expert)
            ties_starve = self.top_k is not None and self.top_k < columns and not self.straight_through
            self.router_init_std = 0.02 if ties_starve and self.scorer.reads_input else 0.0

    @property
    def scorer(self) -> type[Scorer]:
        """The class that scores, found from ``router``."""
        return scorer_class(PRESETS.get(self.router, {}).get("scorer", self.router))

    @property
    def num_experts(self) -> int:
        """E."""
        return self.experts if isinstance(self.experts, int) else len(self.experts)

    @property
    def expert_names(self) -> list[str]:
        """Names in the mixture's order: the order of the gates' columns."""
        if isinstance(self.experts, int):
            return [f"expert_{index}" for index in range(self.experts)]
        if isinstance(self.experts, dict):
            return list(self.experts)
        return [entry["name"] if isinstance(entry, dict) else _folder_name(entry) for entry in self.experts]

    @property
    def experts_embedded(self) -> bool:
        """True once the experts are described by records: in injected, saved and loaded configs."""
        return isinstance(self.experts, list) and all(isinstance(entry, dict) for entry in self.experts)

    def _records(self) -> list[dict[str, Any]]:
        entries = self.experts if isinstance(self.experts, list) else []
        return [entry for entry in entries if isinstance(entry, dict)]

    def sources(self) -> dict[str, str]:
        """Name to folder or Hub id, for a config whose experts are still to be read; else empty."""
        if isinstance(self.experts, dict):
            return dict(self.experts)
        if isinstance(self.experts, list) and not self.experts_embedded:
            return {_folder_name(entry): entry for entry in self.experts}
        return {}

    def specs(self) -> list[ExpertSpec]:
        """Descriptions of fresh or embedded experts.

        Raises:
            PeftMoeError: the experts are adapters that have not been read yet.
        """
        if isinstance(self.experts, int):
            return [
                ExpertSpec(name, r=self.r, lora_alpha=self.lora_alpha, use_rslora=self.use_rslora)
                for name in self.expert_names
            ]
        if not self.experts_embedded:
            raise PeftMoeError("the experts have not been read yet; inject the config into a model first")
        return [ExpertSpec.from_record(record) for record in self._records()]

    @property
    def experts_train(self) -> bool:
        """Whether the experts' own weights train."""
        if self.train_experts is not None:
            return self.train_experts
        return isinstance(self.experts, int) or (
            self.experts_embedded and all(not record.get("source") for record in self._records())
        )

    def router_settings(self) -> RouterSettings:
        """The routing fields, resolved."""
        return RouterSettings(
            scorer=PRESETS.get(self.router, {}).get("scorer", self.router),
            num_experts=self.num_experts,
            null_expert=bool(self.null_expert),
            top_k=self.top_k,
            scoring_func=str(self.scoring_func),
            norm_topk_prob=bool(self.norm_topk_prob),
            straight_through=bool(self.straight_through),
            temperature=float(self.router_temperature or 0.0),
            granularity=str(self.router_granularity),
            pool=str(self.router_pool),
            input_norm=bool(self.router_input_norm),
            init_std=float(self.router_init_std or 0.0),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; sets are sorted, so that the file's bytes do not depend on hashing."""
        values = super().to_dict()
        values.pop("target_parameters", None)
        return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}


def _folder_name(source: str) -> str:
    return str(source).rstrip("/").split("/")[-1].split("@")[0]
