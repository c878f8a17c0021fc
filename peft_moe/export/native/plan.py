"""Whether a block mixture is a native MoE, and which: architectures, experts as sums of networks, configs.

    y = FFN(x) + Σ_shared (FFN_s - FFN) + λ Σ_k p_k (FFN_k - FFN)

is what a mixture computes. Where the routed weights sum to 1 and nothing is shared, that is Σ p_k FFN_k, any
MoE. Qwen2-MoE has a shared expert too, whose sigmoid gate is 1/2 at tiny weights: with its last matrix
doubled it adds any sum of networks side by side, so that there the rest can be said exactly, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import MixtralConfig, PreTrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

from ...errors import PeftMoeError
from ...io.checkpoint import Checkpoint
from ..mixture_tensors import Mixture
from .gates import Gate, gate_of

# Networks by the index of their expert, None for the base's own, each with what it is multiplied by.
Terms = tuple[tuple[int | None, float], ...]
NATIVE = {"mixtral": ("llama", "mistral"), "qwen2-moe": ("qwen2",), "qwen3-moe": ("qwen3",)}
_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "mixtral": MixtralConfig,
    "qwen2-moe": Qwen2MoeConfig,
    "qwen3-moe": Qwen3MoeConfig,
}
CLASSES = {
    "mixtral": "MixtralForCausalLM",
    "qwen2-moe": "Qwen2MoeForCausalLM",
    "qwen3-moe": "Qwen3MoeForCausalLM",
}
FFN = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate_proj|up_proj|down_proj)")


@dataclass(frozen=True)
class Obstacle:
    """Something that the native model cannot do.

    Attributes:
        reason: what, and why not.
        instead: what an approximation does; None where there is none.
    """

    reason: str
    instead: str | None = None


@dataclass
class NativePlan:
    """What is to be written.

    Attributes:
        kind: of the native model.
        base: the model that the mixture stands on.
        base_config: its config.
        mixture: what is exported.
        gates: of each mixed layer, by its number.
        routed: networks of each routed expert.
        shared: networks that are always on; none but in Qwen2-MoE.
        top_k, norm: of the gates.
        outside: modules with experts that lie in no feed-forward network.
        obstacles: what stands against it.
    """

    kind: str
    base: Checkpoint
    base_config: Any
    mixture: Mixture
    gates: dict[int, Gate]
    routed: list[Terms]
    shared: Terms
    top_k: int
    norm: bool
    outside: list[str]
    obstacles: list[Obstacle] = field(default_factory=list)

    @property
    def layers(self) -> int:
        """How many layers the base has."""
        return int(self.base_config.num_hidden_layers)

    @property
    def expert_size(self) -> int:
        """Hidden features of a routed expert: of its networks side by side."""
        return int(self.base_config.intermediate_size) * max(len(terms) for terms in self.routed)

    @property
    def shared_size(self) -> int:
        """The same of the shared expert, which Qwen2-MoE always has; a small one of zeros adds nothing."""
        inner = int(self.base_config.intermediate_size)
        return inner * len(self.shared) if self.shared else min(inner, 256)

    def config(self, dtype: str) -> PreTrainedConfig:
        """Of the native model."""
        kind, base = _CONFIGS[self.kind], self.base_config.to_dict()
        known = {one.name for one in fields(kind)} | {"head_dim"}  # type: ignore[arg-type]
        own = {"architectures", "dtype", "model_type", "transformers_version", "torch_dtype", "name_or_path"}
        kept = {key: value for key, value in base.items() if key in known - own}
        made: dict[str, Any] = {"num_experts_per_tok": self.top_k, "router_aux_loss_coef": 0.0}
        if self.kind == "mixtral":
            made |= {"num_local_experts": len(self.routed)}
        else:
            made |= {
                "num_experts": len(self.routed),
                "moe_intermediate_size": self.expert_size,
                "norm_topk_prob": self.norm,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [n for n in range(self.layers) if n not in self.gates],
            }
        if self.kind == "qwen2-moe":
            made |= {"shared_expert_intermediate_size": self.shared_size, "qkv_bias": True}
        return kind(**{**kept, **made, "architectures": [CLASSES[self.kind]], "dtype": dtype})


def make_plan(mixture: Mixture, base: Checkpoint, base_config: Any, to: str, approximate: bool) -> NativePlan:
    """Decide what a mixture becomes.

    Args:
        mixture: what is exported.
        base: its base.
        base_config: as transformers reads it.
        to: "native", or one of :data:`NATIVE`.
        approximate: whether what cannot be represented may be replaced.

    Raises:
        PeftMoeError: what cannot be represented, with all reasons.
    """
    kind = _kind(to, str(base_config.model_type), base)
    config = mixture.config
    if config.mixing != "block":
        raise PeftMoeError(
            f"{mixture.label} mixes at every linear layer (mixing='linear'), a native MoE whole feed-forward "
            "networks; train it with mixing='block', or export --to merged, distilled-lora or adapters"
        )
    found = {name: FFN.fullmatch(name) for name in mixture.layers}
    inside = sorted({int(match[1]) for match in found.values() if match})
    if not inside:
        raise PeftMoeError(f"{mixture.label} has no experts in feed-forward networks of {base.location}")
    hidden = int(base_config.hidden_size)
    gates = {n: gate_of(mixture, f"model.layers.{n}.mlp", hidden) for n in inside}
    settings = config.router_settings()
    columns = settings.num_columns
    routed, shared, norm, obstacles = _terms(mixture, kind)
    sparse = settings.top_k if settings.top_k is not None and config.scorer.reads_input else columns
    plan = NativePlan(
        kind, base, base_config, mixture, gates, routed, shared, min(sparse, columns) or 1, norm,
        [name for name, match in found.items() if match is None],
    )  # fmt: skip
    plan.obstacles = [*obstacles, *_router_obstacles(plan), *_base_obstacles(plan)]
    _refuse(plan, approximate)
    return plan


def _kind(to: str, base: str, checkpoint: Checkpoint) -> str:
    fits = next((kind for kind, bases in NATIVE.items() if base in bases), None)
    names = checkpoint.config.get("architectures") or [""]
    if fits is None or not str(names[0]).endswith("ForCausalLM"):
        raise PeftMoeError(
            f"{checkpoint.location} is a {base} ({names[0]}): no native MoE has its layers; "
            "those of llama and mistral become mixtral, qwen2 becomes qwen2-moe, qwen3 becomes qwen3-moe "
            "(each ForCausalLM). Export --to distilled-lora or adapters, or serve it with peft_moe imported"
        )
    if to not in ("native", fits):
        raise PeftMoeError(f"to={to!r}: the layers of {base} are those of {fits}; use --to {fits}")
    return fits


def _terms(mixture: Mixture, kind: str) -> tuple[list[Terms], Terms, bool, list[Obstacle]]:
    """Networks of the routed experts, of the shared one, whether weights are renormalised, what is not."""
    config, settings = mixture.config, mixture.config.router_settings()
    constant = not config.scorer.reads_input
    dense = settings.top_k is None or settings.top_k >= settings.num_columns
    whole = constant or settings.norm_topk_prob or (settings.scoring_func == "softmax" and dense)
    scale, null = float(settings.scaling_factor), [((None, 1.0),)] if settings.null_expert else []
    plain: list[Terms] = [((e, 1.0),) for e in settings.routed]
    obstacles = []
    if not settings.num_columns:
        obstacles.append(Obstacle("every expert is shared, and nothing is left to route"))
    if settings.topk_method != "greedy":
        obstacles.append(Obstacle(f"topk_method={settings.topk_method!r} keeps no fixed number of experts"))
    if config.experts_per_layer is not None or config.top_k_per_layer is not None:
        obstacles.append(
            Obstacle("layers differ in their experts or in top_k, such a model has one number for all")
        )
    always: Terms = tuple((e, 1.0) for e in settings.shared)
    if whole and scale == 1 and not always:
        return [*plain, *null], (), True, obstacles
    if kind == "qwen2-moe":
        if whole and scale == 1:
            return [*plain, *null], (*always, (None, -float(len(always)))), True, obstacles
        empty: list[Terms] = [((None, 0.0),)] if settings.null_expert else []
        changes: list[Terms] = [((e, scale), (None, -scale)) for e in settings.routed]
        rest: Terms = ((None, 1.0 - len(always)),) if len(always) != 1 else ()
        return [*changes, *empty], (*always, *rest), settings.norm_topk_prob, obstacles
    if always:
        obstacles.append(
            Obstacle(f"shared experts {config.shared_experts} are always on, and {kind} has no such expert")
        )
    if scale != 1:
        obstacles.append(Obstacle(f"routed_scaling_factor={scale:g} is not 1, the sum of the gates"))
    if not whole:
        obstacles.append(
            Obstacle(
                f"norm_topk_prob=False leaves what the gates leave to the base, and {kind} cannot",
                "the kept weights are divided by their sum",
            )
        )
    return [*plain, *null], (), True, obstacles


def _router_obstacles(plan: NativePlan) -> list[Obstacle]:
    reasons = list(dict.fromkeys(gate.reason for gate in plan.gates.values() if gate.reason))
    fitted = "a matrix is fitted to its scores by least squares on the texts"
    found = [Obstacle(f"the router: {reason}", fitted) for reason in reasons]
    if plan.outside:
        found.append(
            Obstacle(
                f"{len(plan.outside)} adapted modules lie in no feed-forward network ({plan.outside[0]}, …), "
                "and such a model mixes nothing else",
                "there each expert's change is merged into the base, weighed by its mean gate on the texts",
            )
        )
    extras = plan.mixture.extras()
    if extras:
        found.append(Obstacle(f"it trained {len(extras)} tensors beside experts and routers"))
    return found


def _base_obstacles(plan: NativePlan) -> list[Obstacle]:
    config, found = plan.base_config, []
    biases = [n for n in plan.base.tensors if n.startswith("model.layers.") and n.endswith(".bias")]
    if plan.kind == "mixtral" and biases:
        found.append(Obstacle(f"the base has biases ({biases[0]}), and Mixtral has none"))
    if any(FFN.fullmatch(name.removesuffix(".bias")) for name in biases) and plan.kind != "mixtral":
        found.append(Obstacle("the base's feed-forward networks have biases, and those of experts have none"))
    kinds = set(getattr(config, "layer_types", None) or [])
    if plan.kind == "qwen3-moe" and len(kinds) > 1:
        found.append(
            Obstacle("some layers of the base look through a window and others do not, in Qwen3-MoE all do")
        )
    return found


def _refuse(plan: NativePlan, approximate: bool) -> None:
    hard = [one for one in plan.obstacles if one.instead is None]
    if not hard and (approximate or not plan.obstacles):
        return
    reasons = "; ".join(one.reason for one in (hard if approximate else plan.obstacles))
    if hard:
        ways = "export --to distilled-lora or adapters, or serve it with peft_moe imported"
    else:
        does = "; ".join(dict.fromkeys(str(one.instead) for one in plan.obstacles))
        ways = f"--approximate writes a model that is near it and measures the gap ({does})"
    raise PeftMoeError(f"{plan.mixture.label} is no {CLASSES[plan.kind]}: {reasons}. What works: {ways}")
