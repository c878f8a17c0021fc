"""Settings of a bake-off from YAML, from ``key=value`` strings, or from plain data.

A complete file; all but the first three keys have defaults::

    base: models/small
    experts: {law: adapters/law, code: me/code-lora}      # folders, or ids on the Hub
    domains: data               # data/<domain>/{train,test}.jsonl with prompt and completion; or a mapping
    unseen: [poems]             # domains without an expert that no method trains on
    seeds: [0, 1, 2]
    texts: {train_records: 150, test_records: 60, mixed_per_pair: 2, mixed_chars: 300}
    train: {steps: 100, batch_size: 8, learning_rate: 5.0e-3, max_length: 256, bf16: false}
    width: {steps: 1000, batch_size: 8, learning_rate: 2.0e-4}
    score: {measures: [loss, exact], batch_size: 16, max_length: 512, draws: 2000}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ...errors import PeftMoeError, near_matches
from ...io.strict_yaml import read_yaml
from .settings import Domain, ScorePlan, Settings, TextPlan, TrainPlan, WidthPlan

Part = TypeVar("Part")


def read_settings(path: Path | None, overrides: Sequence[str] = ()) -> Settings:
    """Read settings from a YAML file, from ``key=value`` strings, or from both.

    Args:
        path: the YAML file; relative paths in it start from its folder.
        overrides: strings such as ``train.steps=5``; values are YAML, and relative paths start from the
            working directory.

    Raises:
        PeftMoeError: a key is unknown or missing, or a file does not exist.
    """
    import yaml

    raw: dict[str, Any] = {}
    if path is not None:
        if not path.is_file():
            raise PeftMoeError(f"{path}: no such file; write the settings there, or use --set key=value")
        raw = read_yaml(path)
        _anchor(raw, path.parent)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise PeftMoeError(f"--set {text!r} has no '='; write it as --set train.steps=50")
        _put(raw, key.strip().split("."), yaml.safe_load(value))
    return settings_from(raw)


def settings_from(raw: Mapping[str, Any]) -> Settings:
    """Build settings from plain data.

    Raises:
        PeftMoeError: a key is unknown or missing, or a file does not exist.
    """
    values = dict(raw)
    unseen = values.pop("unseen", None) or []
    if "domains" in values:
        values["domains"] = _domains(values["domains"], unseen)
    plans = (("texts", TextPlan), ("train", TrainPlan), ("width", WidthPlan), ("score", ScorePlan))
    for name, plan in plans:
        values[name] = _build(plan, values.get(name) or {}, f"{name}.")
    if "seeds" in values:
        seeds = values["seeds"]
        values["seeds"] = tuple(seeds) if isinstance(seeds, list | tuple) else (int(seeds),)
    if "experts" in values:
        values["experts"] = {str(name): str(source) for name, source in values["experts"].items()}
    return _build(Settings, values, "")


def _build(cls: type[Part], values: Mapping[str, Any], prefix: str) -> Part:
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise PeftMoeError(f"{prefix}{key} is not known.{near_matches(key, fields)}")
    no_default = (dataclasses.MISSING, dataclasses.MISSING)
    required = [name for name, f in fields.items() if (f.default, f.default_factory) == no_default]
    missing = [name for name in required if name not in values]
    if missing:
        raise PeftMoeError(f"{prefix or 'the settings'} lack {missing}; add them to the file, or use --set")
    return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


def _domains(source: Any, unseen: Sequence[str]) -> dict[str, Domain]:
    if isinstance(source, Mapping):
        domains = {name: _build(Domain, files, f"domains.{name}.") for name, files in source.items()}
        domains = {n: Domain(Path(d.test), Path(d.train) if d.train else None) for n, d in domains.items()}
    else:
        folders = sorted(p.parent for p in Path(source).glob("*/test.jsonl"))
        domains = {
            p.name: Domain(p / "test.jsonl", p / "train.jsonl" if (p / "train.jsonl").is_file() else None)
            for p in folders
        }
        if not domains:
            raise PeftMoeError(f"domains={source!r}: no <domain>/test.jsonl in that folder")
    for name in unseen:
        if name not in domains:
            raise PeftMoeError(f"unseen={name!r} is no domain.{near_matches(name, domains)}")
        domains[name] = Domain(domains[name].test)
    for domain in domains.values():
        for path in (domain.test, domain.train):
            if path is not None and not path.is_file():
                raise PeftMoeError(f"{path}: no such file (working directory: {Path.cwd()})")
    return domains


def _anchor(raw: dict[str, Any], folder: Path) -> None:
    """Make relative paths start from the file's folder. Strings that are no path there stay (Hub ids)."""

    def resolve(value: Any) -> Any:
        is_path = isinstance(value, str) and not Path(value).is_absolute() and (folder / value).exists()
        return str(folder / value) if is_path else value

    if raw.get("base") is None:
        raw.pop("base", None)
    else:
        raw["base"] = resolve(raw["base"])
    for key in ("experts", "domains"):
        if isinstance(raw.get(key), dict):
            raw[key] = {
                n: {k: resolve(p) for k, p in v.items()} if isinstance(v, dict) else resolve(v)
                for n, v in raw[key].items()
            }
        elif key in raw:
            raw[key] = resolve(raw[key])


def _put(raw: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = raw.get(key)
        raw = raw.setdefault(key, {}) if inner is None or isinstance(inner, dict) else {}
    raw[keys[-1]] = value
