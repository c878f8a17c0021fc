"""Whether a block mixture is a native MoE: experts as sums of networks, and what stands against it.

A block mixture computes

    y = FFN(x) + Σ_shared (FFN_s - FFN) + λ Σ_k p_k (FFN_k - FFN)

If the routed weights sum to 1, λ is 1 and no expert is shared, this is Σ p_k FFN_k, which any MoE computes.
A target with a shared expert can represent the other cases exactly, too. The sigmoid gate of that expert is
1/2 at tiny weights, so with its last matrix doubled it adds any sum of networks that stand side by side in
it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import PreTrainedConfig

from ...errors import PeftMoeError
from ...io.checkpoint import Checkpoint
from ..mixture_tensors import Mixture
from .gates import Gate, gate_of
from .target import FFN, Layout, NativeTarget, find_target

# A sum of networks: index of the expert (None is the base's own network), and the network's factor.
Terms = tuple[tuple[int | None, float], ...]


@dataclass(frozen=True)
class Obstacle:
    """A part of a mixture that the native model cannot compute.

    Attributes:
        reason: the part, and why it cannot be computed.
        instead: what an approximation does; None if there is no approximation.
    """

    reason: str
    instead: str | None = None


@dataclass
class NativePlan:
    """A native model that is going to be written.

    Attributes:
        target: its architecture.
        base: the model that the mixture stands on.
        base_config: config of the base.
        mixture: what is exported.
        gates: gate of each mixed layer, by the layer's number.
        routed: sum of networks of each routed expert.
        shared: sum of networks that are always on; empty if the target has no shared expert.
        top_k: number of experts per token.
        norm: whether their weights are divided by their sum.
        outside: adapted modules that lie in no feed-forward network.
        obstacles: parts of the mixture that the target cannot compute.
    """

    target: NativeTarget
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
    def layout(self) -> Layout:
        """The sizes of the native model.

        A routed expert holds its networks side by side. A shared expert that adds nothing still has features:
        at most 256, all of them zero.
        """
        inner = int(self.base_config.intermediate_size)
        return Layout(
            base_config=self.base_config,
            experts=len(self.routed),
            top_k=self.top_k,
            norm=self.norm,
            expert_size=inner * max(len(terms) for terms in self.routed),
            shared_size=inner * len(self.shared) if self.shared else min(inner, 256),
            mixed=tuple(self.gates),
        )

    def has_experts(self, layer: int) -> bool:
        """Return whether a layer of the native model has experts."""
        return layer in self.gates or not self.target.unmixed_layers

    def config(self, dtype: str) -> PreTrainedConfig:
        """Return the config of the native model: the base's fields, and those of the target.

        Args:
            dtype: of the weights, as transformers writes it.
        """
        target, base_values = self.target, self.base_config.to_dict()
        accepted = {item.name for item in fields(target.config_class)} | {"head_dim"}
        accepted -= {
            "architectures", "dtype", "model_type", "transformers_version", "torch_dtype", "name_or_path",
        }  # fmt: skip
        values = {key: value for key, value in base_values.items() if key in accepted}
        values |= target.config_fields(self.layout)
        return target.config_class(**{**values, "architectures": [target.architecture], "dtype": dtype})


def make_plan(mixture: Mixture, base: Checkpoint, base_config: Any, to: str, approximate: bool) -> NativePlan:
    """Decide what a mixture becomes.

    Args:
        mixture: what is exported.
        base: its base.
        base_config: config of the base, as transformers reads it.
        to: "native", or the name of a target.
        approximate: whether what cannot be represented may be replaced.

    Raises:
        PeftMoeError: the mixture cannot be represented; the message has all reasons.
    """
    architecture = str((base.config.get("architectures") or [""])[0])
    target = find_target(to, str(base_config.model_type), architecture, str(base.location))
    config = mixture.config
    if config.mixing != "block":
        raise PeftMoeError(
            f"{mixture.label} mixes at every linear layer (mixing='linear'), a native MoE whole feed-forward "
            "networks; train it with mixing='block', or export --to merged, distilled-lora or adapters"
        )
    networks = {name: FFN.fullmatch(name) for name in mixture.layers}
    layers = sorted({int(match[1]) for match in networks.values() if match})
    if not layers:
        raise PeftMoeError(f"{mixture.label} has no experts in feed-forward networks of {base.location}")
    hidden = int(base_config.hidden_size)
    gates = {n: gate_of(mixture, f"model.layers.{n}.mlp", hidden) for n in layers}
    settings = config.router_settings()
    columns = settings.num_columns
    routed, shared, norm, obstacles = _terms(mixture, target)
    sparse = settings.top_k if settings.top_k is not None and config.scorer.reads_input else columns
    plan = NativePlan(
        target, base, base_config, mixture, gates, routed, shared, min(sparse, columns) or 1, norm,
        [name for name, match in networks.items() if match is None],
    )  # fmt: skip
    biases = [n for n in base.tensors if n.startswith("model.layers.") and n.endswith(".bias")]
    plan.obstacles = [*obstacles, *_router_obstacles(plan)]
    plan.obstacles += [Obstacle(reason) for reason in target.base_obstacles(base_config, biases)]
    _refuse(plan, approximate)
    return plan


def _terms(mixture: Mixture, target: NativeTarget) -> tuple[list[Terms], Terms, bool, list[Obstacle]]:
    """Return routed experts, the shared expert, whether weights are renormalised, and the obstacles."""
    config, settings = mixture.config, mixture.config.router_settings()
    constant = not config.scorer.reads_input
    dense = settings.top_k is None or settings.top_k >= settings.num_columns
    sums_to_one = constant or settings.norm_topk_prob or (settings.scoring_func == "softmax" and dense)
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
    if sums_to_one and scale == 1 and not always:
        return [*plain, *null], (), True, obstacles
    if target.shared_expert is not None:
        if sums_to_one and scale == 1:
            return [*plain, *null], (*always, (None, -float(len(always)))), True, obstacles
        empty: list[Terms] = [((None, 0.0),)] if settings.null_expert else []
        changes: list[Terms] = [((e, scale), (None, -scale)) for e in settings.routed]
        rest: Terms = ((None, 1.0 - len(always)),) if len(always) != 1 else ()
        return [*changes, *empty], (*always, *rest), settings.norm_topk_prob, obstacles
    if always:
        obstacles.append(
            Obstacle(
                f"shared experts {config.shared_experts} are always on, and {target.name} has no such expert"
            )
        )
    if scale != 1:
        obstacles.append(Obstacle(f"routed_scaling_factor={scale:g} is not 1, the sum of the gates"))
    if not sums_to_one:
        obstacles.append(
            Obstacle(
                f"norm_topk_prob=False leaves what the gates leave to the base, and {target.name} cannot",
                "the kept weights are divided by their sum",
            )
        )
    return [*plain, *null], (), True, obstacles


def _router_obstacles(plan: NativePlan) -> list[Obstacle]:
    reasons = list(dict.fromkeys(gate.reason for gate in plan.gates.values() if gate.reason))
    fitted = "a matrix is fitted to its scores by least squares on the texts"
    obstacles = [Obstacle(f"the router: {reason}", fitted) for reason in reasons]
    if plan.outside:
        obstacles.append(
            Obstacle(
                f"{len(plan.outside)} adapted modules lie in no feed-forward network ({plan.outside[0]}, …), "
                "and such a model mixes nothing else",
                "there each expert's change is merged into the base, weighed by its mean gate on the texts",
            )
        )
    extras = plan.mixture.extras()
    if extras:
        obstacles.append(Obstacle(f"it trained {len(extras)} tensors beside experts and routers"))
    return obstacles


def _refuse(plan: NativePlan, approximate: bool) -> None:
    hard = [obstacle for obstacle in plan.obstacles if obstacle.instead is None]
    if not hard and (approximate or not plan.obstacles):
        return
    reasons = "; ".join(obstacle.reason for obstacle in (hard if approximate else plan.obstacles))
    if hard:
        advice = "export --to distilled-lora or adapters, or serve it with peft_moe imported"
    else:
        does = "; ".join(dict.fromkeys(str(obstacle.instead) for obstacle in plan.obstacles))
        advice = f"--approximate writes a model that is near it and measures the gap ({does})"
    raise PeftMoeError(
        f"{plan.mixture.label} is no {plan.target.architecture}: {reasons}. What works: {advice}"
    )
