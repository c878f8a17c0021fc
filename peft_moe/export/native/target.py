"""What one native MoE architecture is to the export, and the registry of all of them.

A target is one class in one file of ``targets/``, with :func:`register_target` above it. The rest of the
export plans, streams weights, writes the config and measures the gap without knowing any architecture.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from transformers import PreTrainedConfig

from ...errors import PeftMoeError

# The linear layers of a base's feed-forward network; every base that a target takes has these names.
FFN = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate_proj|up_proj|down_proj)")


@dataclass(frozen=True)
class Layout:
    """The sizes of a native model.

    Attributes:
        base_config: config of the base.
        experts: number of routed experts.
        top_k: number of experts per token.
        norm: whether the k largest weights are divided by their sum.
        expert_size: hidden features of a routed expert.
        shared_size: hidden features of the shared expert, for a target that has one.
        mixed: numbers of the layers that the mixture adapts.
    """

    base_config: Any
    experts: int
    top_k: int
    norm: bool
    expert_size: int
    shared_size: int
    mixed: tuple[int, ...]

    @property
    def layers(self) -> int:
        """Number of layers of the base."""
        return int(self.base_config.num_hidden_layers)

    @property
    def unmixed(self) -> list[int]:
        """Numbers of the layers that the mixture does not adapt."""
        return [number for number in range(self.layers) if number not in self.mixed]


class NativeTarget:
    """One native MoE architecture. Subclasses set the attributes and write :meth:`config_fields`.

    Attributes:
        name: what users write, as in ``export(mixture, out, to="mixtral")``.
        title: what messages call it.
        base_types: ``model_type`` of the bases whose layers it has.
        config_class: config class of transformers.
        architecture: model class of transformers.
        experts_module: name of the module in a layer that holds gate and experts.
        linears: names of an expert's gate, up and down projections.
        shared_expert: name of the module of an expert that is always on, in ``experts_module``; its sigmoid
            gate is ``<name>_gate``. None if the architecture has no such expert.
        unmixed_layers: whether a layer may stay a plain feed-forward network. If not, every expert of a layer
            that the mixture does not adapt is a copy of the base's network.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    base_types: ClassVar[tuple[str, ...]]
    config_class: ClassVar[type[PreTrainedConfig]]
    architecture: ClassVar[str]
    experts_module: ClassVar[str] = "mlp"
    linears: ClassVar[tuple[str, str, str]] = ("gate_proj", "up_proj", "down_proj")
    shared_expert: ClassVar[str | None] = None
    unmixed_layers: ClassVar[bool] = True

    def config_fields(self, layout: Layout) -> dict[str, Any]:
        """Return the config's fields that say how experts are arranged; all others come from the base."""
        return {"num_experts_per_tok": layout.top_k, "router_aux_loss_coef": 0.0}

    def base_obstacles(self, base_config: Any, biases: list[str]) -> list[str]:
        """Return the reasons why this architecture cannot compute a base of a suitable type.

        Args:
            base_config: config of the base.
            biases: names of the biases in the base's layers.
        """
        if any(FFN.fullmatch(name.removesuffix(".bias")) for name in biases):
            return ["the base's feed-forward networks have biases, and those of experts have none"]
        return []

    def server_notes(self, layout: Layout) -> list[str]:
        """Return where vLLM or llama.cpp computes something else from the same files, by their sources."""
        activation = layout.base_config.hidden_act
        return [f"vLLM and llama.cpp compute silu, and this base has {activation}"] * (activation != "silu")


_TARGETS: dict[str, NativeTarget] = {}
TargetT = TypeVar("TargetT", bound=type[NativeTarget])


def register_target(target: TargetT) -> TargetT:
    """Class decorator: make a :class:`NativeTarget` available under its name.

    Raises:
        PeftMoeError: the name belongs to another class.
    """
    registered = _TARGETS.get(target.name)
    if registered is not None and type(registered).__qualname__ != target.__qualname__:
        raise PeftMoeError(
            f"native target {target.name!r} is registered as {type(registered).__name__}; choose another name"
        )
    _TARGETS[target.name] = target()
    return target


def native_targets() -> dict[str, NativeTarget]:
    """Return all targets by name; of several that take a base, the first one is "native"."""
    folder = importlib.import_module(".targets", __package__)
    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f".targets.{module.name}", __package__)
    return _TARGETS


def find_target(to: str, base_type: str, architecture: str, location: str) -> NativeTarget:
    """Return the target that a base becomes.

    Args:
        to: "native", or the name of a target.
        base_type: ``model_type`` of the base.
        architecture: model class of the base.
        location: folder or Hub id of the base, for messages.

    Raises:
        PeftMoeError: no target takes this base, or not the one that is asked for.
    """
    targets = native_targets()
    suitable = [target for target in targets.values() if base_type in target.base_types]
    if not suitable or not architecture.endswith("ForCausalLM"):
        table = ", ".join(
            f"{' and '.join(target.base_types)} become{'s' * (len(target.base_types) == 1)} {name}"
            for name, target in targets.items()
        )
        raise PeftMoeError(
            f"{location} is a {base_type} ({architecture}): no native MoE has its layers; those of {table} "
            "(each ForCausalLM). Export --to distilled-lora or adapters, or serve it with peft_moe imported"
        )
    if to == "native":
        return suitable[0]
    if targets[to] not in suitable:
        names = [target.name for target in suitable]
        raise PeftMoeError(
            f"to={to!r}: the layers of {base_type} are those of {' or '.join(names)}; use --to {names[0]}"
        )
    return targets[to]
