"""Refusals of experts by name and by the base they were trained on, and the words they share."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..errors import refusal, shown
from .base_modules import BaseView, base_modules, family
from .spec import NAME_RULE, RESERVED_NAMES

# A revision is comparable with another of its own kind only: a commit, or a branch or tag.
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_SNAPSHOT = re.compile(r"models--(?P<repo>[^/]+)/snapshots/[^/]+$")


def check_expert_names(names: Iterable[str], base: nn.Module) -> None:
    """Refuse names that would lose tensors when saved, or that are not portable.

    Args:
        names: the experts' names, in order.
        base: the base model. A name equal to one part of a module path (``"0"``, ``"q_proj"``)
            makes PEFT leave other adapters' tensors out of the file (huggingface/peft#3584).

    Raises:
        PeftMoeError: for the first bad name.
    """
    modules = base_modules(base)
    parts = {part for module in modules for part in module.split(".")}
    seen: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str):
            raise refusal(str(name), f"the name {shown(name)} is a {type(name).__name__}", "use a string")
        folded = unicodedata.normalize("NFC", name).casefold()
        if folded in seen:
            what = f"the name equals {shown(seen[folded])} but for case"
            raise refusal(name, what, "rename one of the two")
        if not NAME_RULE.fullmatch(name):
            what = f"the name {shown(name)} is not of the form [A-Za-z0-9_-], 1 to 64 characters"
            raise refusal(name, what, "rename it, for example to 'expert_1'")
        if folded in RESERVED_NAMES:
            raise refusal(name, f"the name {name!r} is reserved", f"rename it, for example to 'my_{name}'")
        if name in parts:
            what = f"the name {name!r} is part of the base's module paths: saving would lose tensors"
            raise refusal(name, what, f"rename it, for example to 'expert_{name}'")
        seen[folded] = name


def check_same_base(expert: str, config: Mapping[str, Any], base: BaseView) -> None:
    """Refuse an adapter that says it was trained on another base; what is unknown passes.

    Args:
        expert: the expert's name.
        config: its validated ``adapter_config.json``.
        base: the base that it is to be mixed into.

    Raises:
        PeftMoeError: if base name, commit or architecture differ.
    """
    fix = "load the base it was trained on, or, for the same weights, pass allow_base_mismatch=True"
    trained_on = config.get("base_model_name_or_path") or ""
    if not _same_name(trained_on, base.name):
        what = f"base_model_name_or_path={shown(trained_on)}, but the base is {shown(base.name)}"
        raise refusal(expert, what, fix)
    revision = config.get("revision")
    if not _same_revision(revision, base.commit):
        what = f"revision={shown(revision)} of the base, but the base is at {shown(base.commit)}"
        raise refusal(expert, what, fix)
    trained_class = (config.get("auto_mapping") or {}).get("base_model_class")
    if trained_class and family(str(trained_class)) not in base.families:
        what = f"auto_mapping.base_model_class={shown(trained_class)}, not the base's architecture"
        raise refusal(expert, what, fix)


def check_one_base(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse experts that name different bases: the base itself may not know its name.

    Args:
        configs: validated ``adapter_config.json`` by expert.

    Raises:
        PeftMoeError: for the first expert that disagrees with an earlier one.
    """
    fix = "mix experts of one base; if the weights are the same, pass allow_base_mismatch=True"
    for field, same in (("base_model_name_or_path", _same_name), ("revision", _same_revision)):
        first: tuple[str, str] | None = None
        for expert, config in configs.items():
            value = config.get(field)
            if value and first is None:
                first = (expert, value)
            elif value and first and not same(value, first[1]):
                raise refusal(expert, f"{field}={shown(value)}, but {first[0]!r} has {shown(first[1])}", fix)


def _same_name(one: str, other: str) -> bool:
    """Whether two names of a base can mean the same model: equal, or equal last path parts."""
    short = [_short_name(name) for name in (one, other)]
    return short[0] == short[1] or any(name in ("", ".", "..") for name in short)


def _short_name(name: str) -> str:
    path = name.replace("\\", "/").rstrip("/")
    snapshot = _SNAPSHOT.search(path)  # a folder of the Hub's cache is named by commit, not by model
    return (snapshot["repo"].split("--")[-1] if snapshot else path.rsplit("/", 1)[-1]).casefold()


def _same_revision(one: str | None, other: str | None) -> bool:
    if not one or not other:
        return True
    commits = [bool(_COMMIT.fullmatch(revision)) for revision in (one, other)]
    if all(commits):
        return one.startswith(other) or other.startswith(one)
    return one == other if not any(commits) else True
