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
_FEATURES = (("in_features", "out_features"), ("infeatures", "outfeatures"), ("nx", "nf"))


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


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """``(in_features, out_features)`` of a linear-like layer; None for anything else.

    Sizes come from attributes, never from the weight: a 4-bit weight is packed, a sharded one is
    empty. ``Conv1D`` of GPT-2 is linear-like, convolutions and embeddings are not.
    """
    for names in _FEATURES if isinstance(module, Conv1D) else _FEATURES[:2]:
        inputs, outputs = (getattr(module, name, None) for name in names)
        if isinstance(inputs, int) and isinstance(outputs, int):
            return inputs, outputs
    return None


def family(class_name: str) -> str:
    """Architecture that a class belongs to: ``llama`` for ``LlamaForCausalLM``."""
    match = _FAMILY.fullmatch(class_name)
    return (match["family"] if match else class_name).casefold()


def _head_name(base: nn.Module, modules: Mapping[str, nn.Module]) -> str | None:
    try:
        head: Any = base.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        head = None  # not a transformers model, or one without a head
    if isinstance(head, AuxiliaryTrainingWrapper):
        head = head.original_module
    if isinstance(head, BaseTunerLayer):
        head = head.get_base_layer()
    by_identity = (name for name, module in modules.items() if head is not None and module is head)
    by_name = (name for name in modules if name.rsplit(".", 1)[-1] == "lm_head")
    return next(by_identity, None) or next(by_name, None)
