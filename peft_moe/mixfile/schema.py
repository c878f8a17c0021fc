"""What a mix file says: mergekit-moe's words and our own, checked before any file that it names is opened.

A whole file; only ``base_model`` and ``experts`` must be there::

    base_model: models/base                  # folder or Hub id; paths start from the file's folder
    experts:                                 # or a list, each with source_model and, if you like, a name
      math: adapters/math                    # a LoRA adapter
      code: {source_model: models/code-full, extract: {max_rank: 32}}     # a full model: extracted first
    router: running                          # and any other field of MoLoraConfig
    fit: {data: {math: math.jsonl, code: code.jsonl}}
    dtype: bfloat16                          # of the base while routers are fitted
    seed: 0

mergekit-moe's ``gate_mode`` ("hidden", "cheap_embed", "random"), ``experts_per_token``, ``positive_prompts``,
``negative_prompts`` and ``shared_experts`` mean here what they mean there.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig

from ..errors import PeftMoeError, near_matches
from ..io.strict_yaml import read_yaml
from ..io.values import is_index
from ..tuner.config.mixture import MoLoraConfig
from .entries import ExpertEntry, anchored, as_text, check_known, read_entries, read_shared, refuse_not_here
from .gates import gate_fields

DTYPES = ("auto", "bfloat16", "float16", "float32")
FIT_KEYS = (
    "data", "method", "regularisation", "inputs", "batch_size", "max_rows", "max_gigabytes", "steps",
    "learning_rate",
)  # fmt: skip
_OWN_KEYS = (
    "base_model", "experts", "shared_experts", "gate_mode", "experts_per_token", "dtype", "extract", "fit",
    "seed",
)  # fmt: skip
# What there is in mergekit, or will be here, and what to say of it. A value that changes nothing is accepted.
NOT_HERE: dict[str, tuple[tuple[Any, ...], str]] = {
    "architecture": ((None,), "a native checkpoint of that architecture cannot be written yet"),
}
# Fields of the config that injection fills, or that this file says in another way.
_INTERNAL = {
    *(f.name for f in dataclasses.fields(PeftConfig)), "experts", "format_version", "base_precision",
    "base_fingerprint", "weights_digest",
    "target_parameters", "shared_experts",
}  # fmt: skip
CONFIG_KEYS = tuple(f.name for f in dataclasses.fields(MoLoraConfig) if f.name not in _INTERNAL)


@dataclass(frozen=True)
class MixFile:
    """A mixture to be.

    Attributes:
        path: of the file.
        base: folder (absolute) or Hub id.
        experts: all of them, in the mixture's order; shared ones last.
        fields: of ``MoLoraConfig``, but for ``experts``.
        fit: arguments of ``fit_router``, with the paths of labelled data under "data"; None: no fit.
        dtype: of the base.
        seed: of everything drawn.
        notes: what was read in another way than one might think.
    """

    path: Path
    base: str
    experts: tuple[ExpertEntry, ...]
    fields: dict[str, Any]
    fit: dict[str, Any] | None
    dtype: str
    seed: int
    notes: tuple[str, ...] = ()

    @property
    def prompts(self) -> dict[str, dict[str, list[str]]]:
        """For ``fit_router``: the described experts' examples."""
        return {
            e.name: {"positive": list(e.positive), "negative": list(e.negative)}
            for e in self.experts
            if e.positive
        }

    def config(self, experts: Mapping[str, str] | list[dict[str, Any]], **more: Any) -> MoLoraConfig:
        """The mixture's config.

        Args:
            experts: adapters by name, or records that describe them.
            more: further fields.

        Raises:
            PeftMoeError: fields that cannot work.
        """
        given = experts if isinstance(experts, list) else dict(experts)
        return MoLoraConfig(experts=given, **{**self.fields, **more})


def read_mix_file(path: str | os.PathLike[str]) -> MixFile:
    """Read and check a mix file.

    Raises:
        PeftMoeError: an unknown key (with near matches), a missing one, two that contradict each other, or
            something that cannot be mixed.
    """
    place = Path(path).expanduser()
    raw = read_yaml(place)
    refuse_not_here(raw, NOT_HERE, str(place))
    check_known(raw, (*_OWN_KEYS, *CONFIG_KEYS), str(place), NOT_HERE)
    folder = place.resolve().parent
    base = _base(raw, folder, place)
    routed = read_entries(raw.get("experts"), "experts", folder, base, raw.get("extract"))
    shared, shared_names = read_shared(raw.get("shared_experts"), folder, base, raw.get("extract"))
    experts = (*routed, *shared)
    _check_names(experts)
    fields = {key: raw[key] for key in CONFIG_KEYS if raw.get(key) is not None}
    if shared_names:
        fields["shared_experts"] = shared_names
    columns = [e for e in routed if e.name not in shared_names]
    gates, notes = gate_fields(raw, columns, fields)
    fields.update(gates)
    dtype = _choice(raw.get("dtype"), DTYPES, "dtype", "auto")
    fit = _fit(raw.get("fit"), folder, any(e.positive for e in experts))
    return MixFile(place, base, experts, fields, fit, dtype, _seed(raw.get("seed")), tuple(notes))


def _base(raw: Mapping[str, Any], folder: Path, place: Path) -> str:
    if not raw.get("base_model"):
        raise PeftMoeError(f"{place} names no base_model; add the folder or Hub id of the base")
    return anchored(as_text(raw["base_model"], "base_model"), folder)


def _check_names(experts: Iterable[ExpertEntry]) -> None:
    seen: dict[str, str] = {}
    for entry in experts:
        folded = entry.name.casefold()
        if folded in seen:
            raise PeftMoeError(
                f"two experts are called {entry.name!r} ({seen[folded]} and {entry.source}); give each a "
                "`name`"
            )
        seen[folded] = entry.source


def _fit(given: Any, folder: Path, described: bool) -> dict[str, Any] | None:
    if given is None:
        return {} if described else None
    check_known(given, FIT_KEYS, "fit")
    values = dict(given)
    data = values.get("data")
    if described and data is not None:
        raise PeftMoeError("experts have positive_prompts and fit has data: keep one of the two")
    if not described and data is None and values.get("method") != "arrow":
        raise PeftMoeError("fit has no data: name a file with a `domain` column, or one file for each domain")
    if isinstance(data, Mapping):
        values["data"] = {name: _data_file(one, folder) for name, one in data.items()}
    elif data is not None:
        values["data"] = _data_file(data, folder)
    return values


def _data_file(given: Any, folder: Path) -> str:
    path = anchored(as_text(given, "fit.data"), folder)
    if path.endswith((".jsonl", ".json")) and not Path(path).is_file():
        raise PeftMoeError(f"fit.data: there is no file {given!r} in {folder}; correct the path")
    return path


def _seed(given: Any) -> int:
    if given is None:
        return 0
    if not is_index(given):
        raise PeftMoeError(f"seed={given!r} must be a whole number ≥ 0")
    return int(given)


def _choice(given: Any, options: tuple[str, ...], key: str, default: str) -> str:
    if given is not None and given not in options:
        raise PeftMoeError(f"{key}={given!r} is not known.{near_matches(str(given), options)}")
    return str(given or default)
