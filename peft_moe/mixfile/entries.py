"""The experts of a mix file, in mergekit-moe's form or ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import PeftMoeError, near_matches
from ..io.dtypes import NAMED_DTYPES

EXTRACT_KEYS = ("rank", "energy", "max_rank", "dense", "target_modules", "dtype")
_EXPERT_KEYS = ("name", "source_model", "positive_prompts", "negative_prompts", "extract", "keep")
_KEEPS = ("low_rank", "dense")
NOT_OF_EXPERTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "noise_scale": ((None, 0, 0.0), "noise on an expert's weights is not offered"),
    "residual_scale": ((None, 1, 1.0), "an expert adds what it learnt, with its gate as weight"),
}


@dataclass(frozen=True)
class ExpertEntry:
    """One expert of a file.

    Attributes:
        name: in the mixture.
        source: folder (absolute) or Hub id of an adapter or a full model.
        extract: settings for a full model.
        positive, negative: prompts that describe it.
    """

    name: str
    source: str
    extract: dict[str, Any] = field(default_factory=dict)
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()


def refuse_not_here(
    values: Mapping[str, Any], table: Mapping[str, tuple[tuple[Any, ...], str]], where: str
) -> None:
    """Keys that exist elsewhere, or will here, at a value that would change something.

    Raises:
        PeftMoeError: with the reason.
    """
    for key, (harmless, why) in table.items():
        value = values.get(key)
        if not any(value is one or (type(value) is type(one) and value == one) for one in harmless):
            raise PeftMoeError(f"{where}: {key}: {value!r} is not possible: {why}; leave {key} out")


def check_known(values: Any, keys: Iterable[str], where: str, also: Iterable[str] = ()) -> None:
    """Refuse what is no mapping, and keys that are neither in ``keys`` nor in ``also``."""
    if not isinstance(values, Mapping):
        raise PeftMoeError(f"{where} must hold keys and values, not {values!r}")
    for key in values:
        if key not in (*keys, *also):
            raise PeftMoeError(f"{where}: {key!r} is not known.{near_matches(key, keys)}")


def _extract(given: Any, where: str) -> dict[str, Any]:
    if given is None:
        return {}
    check_known(given, EXTRACT_KEYS, where)
    dtype = given.get("dtype", "auto")
    if dtype not in ("auto", *NAMED_DTYPES):
        raise PeftMoeError(f"{where}.dtype={dtype!r} is not known.{near_matches(str(dtype), NAMED_DTYPES)}")
    return {key: value for key, value in given.items() if value is not None}


def _settings(defaults: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """An expert's own way to choose ranks replaces the file's, which may be another."""
    if "rank" in own or "energy" in own:
        defaults = {key: value for key, value in defaults.items() if key not in ("rank", "energy", "dense")}
    if own.get("dense"):
        defaults = {
            key: value for key, value in defaults.items() if key not in ("rank", "energy", "max_rank")
        }
    return {**defaults, **own}


def as_text(value: Any, key: str) -> str:
    """``value``, which must be text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise PeftMoeError(f"{key}={value!r} must be text")
    return value


def anchored(text: str, folder: Path) -> str:
    """A path that exists from ``folder``, absolute; what is none is a Hub id and stays."""
    path = Path(text).expanduser()
    found = path if path.is_absolute() else folder / path
    return str(found.resolve()) if found.exists() or path.is_absolute() or text.startswith(".") else text


def read_entries(given: Any, key: str, folder: Path, base: str, defaults: Any) -> tuple[ExpertEntry, ...]:
    """Experts from a list, or from names and sources.

    Args:
        given: what the file has.
        key: under which key.
        folder: of the file; paths start there.
        base: the file's base.
        defaults: settings of extractions that the experts' own override.
    """
    if isinstance(given, Mapping):
        items = [(name, value) for name, value in given.items()]
    elif isinstance(given, list):
        items = [(None, value) for value in given]
    else:
        items = []
    if not items:
        raise PeftMoeError(
            f"{key}={given!r} must name one or more experts: a list of {{source_model: …}}, or names and "
            "sources"
        )
    return tuple(
        _entry(name, value, f"{key}[{i}]", folder, base, defaults) for i, (name, value) in enumerate(items)
    )


def _entry(name: str | None, value: Any, where: str, folder: Path, base: str, defaults: Any) -> ExpertEntry:
    values = {"source_model": value} if isinstance(value, str) else value
    where = f"experts.{name}" if name else where
    if isinstance(values, Mapping):
        refuse_not_here(values, NOT_OF_EXPERTS, where)
    check_known(values, _EXPERT_KEYS, where, NOT_OF_EXPERTS)
    if not values.get("source_model"):
        raise PeftMoeError(
            f"{where} names no source_model; give an adapter's or full model's folder or Hub id"
        )
    if name and values.get("name") not in (None, name):
        raise PeftMoeError(f"{where} is named {values['name']!r} as well; keep one name")
    source = _source(as_text(values["source_model"], f"{where}.source_model"), where, folder, base)
    chosen = _extract(values.get("extract"), f"{where}.extract")
    keep = values.get("keep")
    if keep is not None and keep not in _KEEPS:
        raise PeftMoeError(f"{where}.keep={keep!r} is not known.{near_matches(str(keep), _KEEPS)}")
    if keep is not None:
        chosen = {**chosen, "dense": keep == "dense"}
    settings = _settings(_extract(defaults, "extract"), chosen)
    own = name or values.get("name")
    positive, negative = (
        _prompts(values.get(f"{side}_prompts"), where, side) for side in ("positive", "negative")
    )
    if negative and not positive:
        raise PeftMoeError(f"{where} has negative_prompts only; add positive_prompts")
    called = as_text(own, f"{where}.name") if own else _name_of(source)
    return ExpertEntry(called, source, settings, positive, negative)


def _source(text: str, where: str, folder: Path, base: str) -> str:
    """mergekit writes an adapter with its base as "base+adapter"."""
    first, plus, adapter = text.partition("+")
    if not plus or (folder / text).exists():
        return anchored(text, folder)
    if anchored(first, folder) != base:
        raise PeftMoeError(
            f"{where}.source_model={text!r}: the adapter's base {first!r} is not base_model {base!r}; mix "
            "experts of one base"
        )
    return anchored(adapter, folder)


def _name_of(source: str) -> str:
    last = source.rstrip("/").rsplit("/", 1)[-1].split("@")[0]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", last)[:64]


def _prompts(given: Any, where: str, side: str) -> tuple[str, ...]:
    if given is None:
        return ()
    if not isinstance(given, list) or not all(isinstance(one, str) and one.strip() for one in given):
        raise PeftMoeError(f"{where}.{side}_prompts={given!r} must be a list of texts")
    return tuple(given)


def read_shared(
    given: Any, folder: Path, base: str, defaults: Any
) -> tuple[tuple[ExpertEntry, ...], list[str]]:
    """mergekit's form describes further experts, ours names some of ``experts``."""
    if not given:
        return (), []
    if isinstance(given, list) and all(isinstance(one, str) for one in given):
        return (), list(given)
    entries = read_entries(given, "shared_experts", folder, base, defaults)
    for entry in entries:
        if entry.positive:
            raise PeftMoeError(
                f"shared_experts: {entry.name!r} has prompts, but a shared expert is always on; leave them "
                "out"
            )
    return entries, [entry.name for entry in entries]
