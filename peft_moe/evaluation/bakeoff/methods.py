"""Who takes part: a table of data, read from YAML and checked against what this version has."""

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
"""Groups of methods, from the least to the most that they ask for."""
_NEEDS = {"nothing": NO_DATA, "labels": FITTED, "text": TRAINED}
_KEYS = (*KINDS, "fit", "train", "varies", "needs", "budget")
_ROBUST = ("generic_share", "domain_randomisation", "switching_share")


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: in tables and file names.
        kind: "base", "expert", or one of `KINDS`.
        fields: what that kind takes: fields of ``MoLoraConfig``, arguments of a merge, …
        fit: arguments of ``fit_router`` (its ``method``), or None.
        train: whether it is trained by gradient.
        learning_rate: its own, or None for that of all.
        robust: a mixture's own options of ``training.robustness``, by name.
        varies: whether it runs once per seed.
        group: one of `EFFORT`, or `REFERENCE`.
        routers_budget: of a wide LoRA, whether it has the routers' samples and steps, not all data and
            `Settings.width`.
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
        """What decides its scores, as plain data."""
        seldom = [name for name in ("robust", "routers_budget") if not getattr(self, name)]
        skipped = ("name", "varies", "group", *seldom)
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in skipped}


def references(experts: Mapping[str, str]) -> list[Method]:
    """The base, and each expert alone; the oracle follows from their scores."""
    alone = [Method(name, "expert", {"adapter": name}) for name in experts]
    return [Method(BASE, "base"), *alone]


def read_methods(extra: Path | None = None) -> list[Method]:
    """The table of this package, with a file of one's own laid over it.

    Raises:
        PeftMoeError: an entry that cannot be read.
    """
    paths = [Path(__file__).with_name("methods.yaml"), *([extra] if extra else [])]
    entries: dict[str, Any] = {}
    for path in paths:
        if not path.is_file():
            raise PeftMoeError(f"{path}: no such file; --methods-file takes a YAML file of methods")
        entries |= read_yaml(path)
    found = [method_from(str(name), entry) for name, entry in entries.items() if entry is not None]
    stems = [one.file_stem for one in found]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise PeftMoeError(
            f"methods of nearly the same name: {twice}; their files would overwrite each other"
        )
    return found


def method_from(name: str, entry: Mapping[str, Any]) -> Method:
    """One entry of the table.

    Raises:
        PeftMoeError: an unknown key, or not exactly one kind.
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
    own = dict(train) if isinstance(train, Mapping) else {}
    _check_own(name, kind, own)
    needs = entry.get("needs", "text" if train else "labels" if fit else "nothing")
    if needs not in _NEEDS:
        raise PeftMoeError(f"method {name!r}: needs={needs!r} is not known.{near_matches(needs, _NEEDS)}")
    budget = entry.get("budget", "width")
    if budget not in ("width", "train") or ("budget" in entry and kind != "width"):
        raise PeftMoeError(
            f"method {name!r}: budget={budget!r}; of a width method alone, 'width' (its own steps on all "
            "data) or 'train' (the routers' samples and steps)"
        )
    return Method(
        name=name,
        kind=kind,
        fields=dict(entry[kind] or {}),
        fit={"method": fit} if isinstance(fit, str) else fit,
        train=bool(train),
        learning_rate=float(own["learning_rate"]) if "learning_rate" in own else None,
        robust={key: float(own[key]) for key in _ROBUST if key in own},
        varies=bool(entry.get("varies", train)),
        group=RETRAINED if kind == "width" else _NEEDS[needs],
        routers_budget=budget == "train",
    )


def _check_own(name: str, kind: str, own: Mapping[str, Any]) -> None:
    allowed = ("learning_rate", *(_ROBUST if kind == "mixture" else ()))
    strange = sorted(set(own) - set(allowed))
    if strange:
        raise PeftMoeError(
            f"method {name!r}: train={dict(own)!r} may set {list(allowed)}; {strange[0]!r} is the same for "
            f"all, and stands in the settings, or is not known.{near_matches(strange[0], allowed)}"
        )


def unsupported_reason(one: Method) -> str | None:
    """Why this version cannot run a mixture: a router or field that it does not know; else None."""
    if one.kind != "mixture":
        return None
    fields = {f.name for f in dataclasses.fields(MoLoraConfig)}
    routers = {*PRESETS, *available_scorers()}
    router = one.fields.get("router", "linear")
    if router not in routers:
        return f"router {router!r} is not registered.{near_matches(router, routers)}"
    strange = [key for key in one.fields if key not in fields]
    return f"MoLoraConfig has no field {strange[0]!r}" if strange else None
