"""A base model as adapters see it: its own modules by name, its head, its name. Never changed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

_FAMILY = re.compile(
    r"(?P<family>.+?)(For[A-Z]\w*|LMHeadModel|WithLMHead\w*|DoubleHeadsModel|PreTrainedModel|TextModel|Model)"
)
# Attributes that hold the sizes of a linear layer: torch's and most quantisers', AutoGPTQ's.
_SIZES = (("in_features", "out_features"), ("infeatures", "outfeatures"))


@dataclass(frozen=True)
class BaseView:
    """A base model as adapters see it.

    Attributes:
        modules: its own modules by their own names; wrappers of other adapters are seen through.
        head: name of the output embedding (``lm_head``), where there is one.
        name: what the base was loaded from; empty if it was made from a config.
        commit: Hub commit that it was loaded at, where known.
        families: architecture of its class and of that class's parents, lower case (``{"llama"}``).
    """

    modules: dict[str, nn.Module]
    head: str | None
    name: str
    commit: str | None
    families: frozenset[str]

    @classmethod
    def of(cls, base: nn.Module) -> BaseView:
        """Look at ``base``, which may already carry adapters of any PEFT method."""
        config = getattr(base, "config", None)
        modules = base_modules(base)
        return cls(
            modules=modules,
            head=_head_name(base, modules),
            name=str(getattr(base, "name_or_path", "") or getattr(config, "_name_or_path", "") or ""),
            commit=getattr(config, "_commit_hash", None),
            # FSDP and others put a subclass in place of the class: any ancestor may match.
            families=frozenset(family(parent.__name__) for parent in type(base).__mro__),
        )


def base_modules(base: nn.Module) -> dict[str, nn.Module]:
    """The base's own modules by name, as if no adapter had ever been injected.

    A tuner layer stands for the layer that it wraps; its adapters, and tuner layers that wrap
    nothing (a shared router), are no modules of the base. A module shared under two names appears
    under the first, as in ``named_modules()``.
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def walk(name: str, module: nn.Module) -> None:
        if isinstance(module, AuxiliaryTrainingWrapper):
            walk(name, module.original_module)
        elif isinstance(module, BaseTunerLayer):
            wrapped = getattr(module, "base_layer", None)
            if wrapped is not None:
                walk(name, wrapped)
        elif id(module) not in seen:
            seen.add(id(module))
            if name:
                found[name] = module
            for part, child in module.named_children():
                walk(f"{name}.{part}" if name else part, child)

    walk("", base)
    return found


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Return ``(in_features, out_features)`` of a linear-like layer, None for any other module.

    The sizes are attributes of the layer. Its weight does not tell them: a 4-bit weight is packed, a sharded
    one is empty, and some quantised layers have none. GPT-2's ``Conv1D`` is linear-like; convolutions and
    embeddings are not.

    Args:
        module: any module; one that PEFT has wrapped counts as what is inside.
    """
    layer = unwrap(module)
    for inputs_name, outputs_name in (("nx", "nf"),) if isinstance(layer, Conv1D) else _SIZES:
        inputs, outputs = getattr(layer, inputs_name, None), getattr(layer, outputs_name, None)
        if isinstance(inputs, int) and isinstance(outputs, int):
            return inputs, outputs
    return None


def unwrap(module: Any) -> Any:
    """Return the module of the base that lies inside PEFT's wrappers; any other module as it is."""
    inner = module
    if isinstance(module, AuxiliaryTrainingWrapper):
        inner = module.original_module
    elif isinstance(module, BaseTunerLayer):
        inner = module.get_base_layer()  # itself where it wraps nothing, as a router on its own
    return module if inner is module else unwrap(inner)


def family(class_name: str) -> str:
    """Architecture that a class belongs to: ``llama`` for ``LlamaForCausalLM``."""
    match = _FAMILY.fullmatch(class_name)
    return (match["family"] if match else class_name).casefold()


def _head_name(base: nn.Module, modules: Mapping[str, nn.Module]) -> str | None:
    try:
        head: Any = base.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        head = None  # not a transformers model, or one without a head
    head = unwrap(head)
    by_identity = (name for name, module in modules.items() if head is not None and module is head)
    by_name = (name for name in modules if name.rsplit(".", 1)[-1] == "lm_head")
    return next(by_identity, None) or next(by_name, None)
