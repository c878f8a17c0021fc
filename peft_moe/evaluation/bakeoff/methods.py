"""The methods of a bake-off: entries of a YAML table, checked against what this version supports."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import PeftMoeError, near_matches
from ...io.strict_yaml import read_yaml
from ...routers import PRESETS, available_scorers
from ...tuner.config.mixture import MoLoraConfig

KINDS = ("mixture", "merge", "arrow", "xlora", "width")
BASE, ORACLE = "base", "oracle"
NO_DATA, FITTED, TRAINED, RETRAINED, REFERENCE = "no data", "fitted", "trained", "retrained", "reference"
EFFORT = (NO_DATA, FITTED, TRAINED, RETRAINED)
"""Groups of methods, in the order of what they need: from nothing to a new training."""
_NEEDS = {"nothing": NO_DATA, "labels": FITTED, "text": TRAINED}
_KEYS = (*KINDS, "fit", "train", "varies", "needs", "budget")
_ROBUST = ("generic_share", "domain_randomisation", "switching_share")


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: its name in tables and file names.
        kind: "base", "expert", or one of `KINDS`.
        fields: arguments of that kind: fields of ``MoLoraConfig``, arguments of a merge, and so on.
        fit: arguments of ``fit_router`` (its ``method`` among them), or None.
        train: whether it is trained by gradient.
        learning_rate: its learning rate, or None for that of the settings.
        robust: options of ``training.data.augmentation`` by name; only mixtures have them.
        varies: whether it runs once per seed.
        group: one of `EFFORT`, or `REFERENCE`.
        routers_budget: for a wide LoRA, whether it gets the routers' samples and steps instead of all data
            and `Settings.width`.
    """

    name: str
    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    fit: dict[str, Any] | None = None
    train: bool = False
    learning_rate: float | None = None
    robust: dict[str, float] = field(default_factory=dict)
    varies: bool = False
    group: str = REFERENCE
    routers_budget: bool = False

    @property
    def own_budget(self) -> bool:
        """Whether it trains by `Settings.width` instead of `Settings.train`."""
        return self.kind == "width" and not self.routers_budget

    @property
    def file_stem(self) -> str:
        """The name as part of a file name."""
        return re.sub(r"[^A-Za-z0-9._]+", "-", self.name)

    def identity(self) -> dict[str, Any]:
        """Return the fields that determine its scores, as plain data.

        Fields added later are left out while they are empty, so that older score files stay valid.
        """
        added_later = [name for name in ("robust", "routers_budget") if not getattr(self, name)]
        skipped = ("name", "varies", "group", *added_later)
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in skipped}


def references(experts: Mapping[str, str]) -> list[Method]:
    """Return the base and each single expert; the oracle is computed from their scores."""
    single_experts = [Method(name, "expert", {"adapter": name}) for name in experts]
    return [Method(BASE, "base"), *single_experts]


def read_methods(extra: Path | None = None) -> list[Method]:
    """Read the built-in table of methods, extended or overridden by a second file.

    Raises:
        PeftMoeError: a file does not exist, or an entry is invalid.
    """
    paths = [Path(__file__).with_name("methods.yaml"), *([extra] if extra else [])]
    entries: dict[str, Any] = {}
    for path in paths:
        if not path.is_file():
            raise PeftMoeError(f"{path}: no such file; --methods-file takes a YAML file of methods")
        entries |= read_yaml(path)
    methods = [method_from(str(name), entry) for name, entry in entries.items() if entry is not None]
    stems = [method.file_stem for method in methods]
    repeated = sorted({stem for stem in stems if stems.count(stem) > 1})
    if repeated:
        raise PeftMoeError(
            f"several methods share the file name {repeated}, and their score files would overwrite each "
            "other; rename one of them"
        )
    return methods


def method_from(name: str, entry: Mapping[str, Any]) -> Method:
    """Build a method from one entry of the table.

    Raises:
        PeftMoeError: an unknown key or value, or not exactly one kind.
    """
    if not isinstance(entry, Mapping):
        raise PeftMoeError(f"method {name!r} is {entry!r}; write it as {{mixture: {{router: linear}}, …}}")
    for key in entry:
        if key not in _KEYS:
            raise PeftMoeError(f"method {name!r}: {key!r} is not known.{near_matches(key, _KEYS)}")
    kinds = [key for key in KINDS if key in entry]
    if len(kinds) != 1:
        raise PeftMoeError(f"method {name!r} has {kinds or 'none'} of {list(KINDS)}; it must be one of them")
    kind, fit, train = kinds[0], entry.get("fit"), entry.get("train", False)
    if kind == "width":
        train = train or True
    train_options = dict(train) if isinstance(train, Mapping) else {}
    _check_train_options(name, kind, train_options)
    needs = entry.get("needs", "text" if train else "labels" if fit else "nothing")
    if needs not in _NEEDS:
        raise PeftMoeError(f"method {name!r}: needs={needs!r} is not known.{near_matches(needs, _NEEDS)}")
    budget = entry.get("budget", "width")
    if budget not in ("width", "train") or ("budget" in entry and kind != "width"):
        raise PeftMoeError(
            f"method {name!r}: budget={budget!r}; only a width method has a budget, and it is 'width' (its "
            "own steps on all data) or 'train' (the routers' samples and steps)"
        )
    return Method(
        name=name,
        kind=kind,
        fields=dict(entry[kind] or {}),
        fit={"method": fit} if isinstance(fit, str) else fit,
        train=bool(train),
        learning_rate=float(train_options["learning_rate"]) if "learning_rate" in train_options else None,
        robust={key: float(train_options[key]) for key in _ROBUST if key in train_options},
        varies=bool(entry.get("varies", train)),
        group=RETRAINED if kind == "width" else _NEEDS[needs],
        routers_budget=budget == "train",
    )


def _check_train_options(name: str, kind: str, options: Mapping[str, Any]) -> None:
    allowed = ("learning_rate", *(_ROBUST if kind == "mixture" else ()))
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise PeftMoeError(
            f"method {name!r}: train={dict(options)!r} may set {list(allowed)}; {unknown[0]!r} is not known, "
            f"or is the same for all methods and belongs in the settings.{near_matches(unknown[0], allowed)}"
        )


def unsupported_reason(method: Method) -> str | None:
    """Return why this version cannot run a mixture (an unknown router or field), or None if it can."""
    if method.kind != "mixture":
        return None
    fields = {f.name for f in dataclasses.fields(MoLoraConfig)}
    routers = {*PRESETS, *available_scorers()}
    router = method.fields.get("router", "linear")
    if router not in routers:
        return f"router {router!r} is not registered.{near_matches(router, routers)}"
    unknown = [key for key in method.fields if key not in fields]
    return f"MoLoraConfig has no field {unknown[0]!r}" if unknown else None
