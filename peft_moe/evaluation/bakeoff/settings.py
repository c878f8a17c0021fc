"""What a bake-off is told: base, experts, texts, budgets; checked before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ...errors import PeftMoeError, near_matches

MEASURES = ("loss", "exact")
Part = TypeVar("Part")


@dataclass(frozen=True)
class Domain:
    """Files of one domain, JSON lines with ``prompt`` and ``completion``.

    Attributes:
        test: texts to score.
        train: texts to fit and train on; None keeps the domain unseen.
    """

    test: Path
    train: Path | None = None


@dataclass(frozen=True)
class TextPlan:
    """How many texts of each domain.

    Attributes:
        train_records: per expert's domain, for fitting and training.
        generic_records: the same per domain without an expert; default: as many.
        test_records: scored per domain.
        mixed_per_pair: texts of two domains, per ordered pair of experts' domains; 0 makes none.
        mixed_chars: where each completion of such a text is cut, in characters.
    """

    train_records: int = 150
    generic_records: int | None = None
    test_records: int = 60
    mixed_per_pair: int = 2
    mixed_chars: int = 300


@dataclass(frozen=True)
class TrainPlan:
    """The budget of every trained router.

    Attributes:
        steps: optimizer steps.
        batch_size: samples per step.
        learning_rate: its maximum, unless the method names its own; cosine decay to zero.
        max_length: tokens kept of a sample.
        bf16: autocast.
    """

    steps: int = 100
    batch_size: int = 8
    learning_rate: float = 5.0e-3
    max_length: int | None = 256
    bf16: bool = False


@dataclass(frozen=True)
class WidthPlan:
    """One LoRA as wide as all experts together, trained on the pooled training files.

    Attributes:
        steps: optimizer steps; 0 leaves it out. Honest is the sum of the experts' own steps.
        batch_size: samples per step, as the experts had.
        learning_rate: its maximum, as the experts had.
    """

    steps: int = 0
    batch_size: int = 8
    learning_rate: float = 2.0e-4


@dataclass(frozen=True)
class ScorePlan:
    """How texts are scored.

    Attributes:
        measures: "loss", "exact" (share of answers predicted exactly) or both; advice follows the first.
        batch_size: texts per pass.
        max_length: tokens kept of a text; None keeps all.
        draws: bootstrap resamples.
    """

    measures: tuple[str, ...] = ("loss",)
    batch_size: int = 16
    max_length: int | None = 512
    draws: int = 2000


@dataclass(frozen=True)
class Settings:
    """One bake-off; a YAML file has the same keys.

    Attributes:
        base: folder or Hub id of the base.
        experts: name → folder or Hub id of a LoRA adapter; the names are those of their domains.
        domains: name → files. In YAML also one folder that holds ``<domain>/{train,test}.jsonl``.
        seeds: of every method that varies by seed; the others run once.
        texts, train, width, score: the budgets.
        dtype: of the base.
    """

    base: str
    experts: dict[str, str]
    domains: dict[str, Domain]
    seeds: tuple[int, ...] = (0,)
    texts: TextPlan = field(default_factory=TextPlan)
    train: TrainPlan = field(default_factory=TrainPlan)
    width: WidthPlan = field(default_factory=WidthPlan)
    score: ScorePlan = field(default_factory=ScorePlan)
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if len(self.experts) < 2:
            raise PeftMoeError(f"experts={sorted(self.experts)}: a bake-off needs two or more to mix")
        homeless = [name for name in self.experts if name not in self.domains]
        if homeless:
            raise PeftMoeError(
                f"experts {homeless} have no domain of their name; `domains` has {sorted(self.domains)}. An "
                "expert's texts are found by its name"
            )
        untaught = [name for name in self.experts if self.domains[name].train is None]
        if untaught:
            raise PeftMoeError(f"domains {untaught} have experts but no `train` file; add one to each")
        strange = [name for name in self.score.measures if name not in MEASURES]
        if strange or not self.score.measures:
            raise PeftMoeError(f"score.measures={list(self.score.measures)}: choose from {list(MEASURES)}")
        if not self.seeds:
            raise PeftMoeError("seeds is empty; give one or more numbers")

    @property
    def generic(self) -> list[str]:
        """Domains without an expert that may be trained on: examples of "none of them"."""
        return [n for n, d in self.domains.items() if n not in self.experts and d.train is not None]

    @property
    def unseen(self) -> list[str]:
        """Domains without an expert that are only scored."""
        return [n for n, d in self.domains.items() if n not in self.experts and d.train is None]


def read_settings(path: Path | None, overrides: Sequence[str] = ()) -> Settings:
    """Settings from a YAML file, from ``key=value`` texts, or from both.

    Args:
        path: of the file; relative paths in it start from its folder.
        overrides: such as ``train.steps=5``; values are YAML, and paths start from the working directory.

    Raises:
        PeftMoeError: an unknown key, a missing one, a file that is not there.
    """
    import yaml

    raw: dict[str, Any] = {}
    if path is not None:
        if not path.is_file():
            raise PeftMoeError(f"{path}: no such file; write the settings there, or use --set key=value")
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if not isinstance(raw, dict):
            raise PeftMoeError(f"{path} holds a {type(raw).__name__}, not keys and values")
        _anchor(raw, path.parent)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise PeftMoeError(f"--set {text!r} has no '='; write it as --set train.steps=50")
        _put(raw, key.strip().split("."), yaml.safe_load(value))
    return settings_from(raw)


def settings_from(raw: Mapping[str, Any]) -> Settings:
    """Settings from plain data.

    Raises:
        PeftMoeError: as :func:`read_settings`.
    """
    values = dict(raw)
    unseen = values.pop("unseen", None) or []
    if "domains" in values:
        values["domains"] = _domains(values["domains"], unseen)
    for name, part in (("texts", TextPlan), ("train", TrainPlan), ("width", WidthPlan), ("score", ScorePlan)):
        values[name] = _build(part, values.get(name) or {}, f"{name}.")
    if "seeds" in values:
        seeds = values["seeds"]
        values["seeds"] = tuple(seeds) if isinstance(seeds, list | tuple) else (int(seeds),)
    if "experts" in values:
        values["experts"] = {str(name): str(source) for name, source in values["experts"].items()}
    return _build(Settings, values, "")


def _build(cls: type[Part], values: Mapping[str, Any], place: str) -> Part:
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise PeftMoeError(f"{place}{key} is not known.{near_matches(key, fields)}")
    nothing = (dataclasses.MISSING, dataclasses.MISSING)
    missing = [n for n, f in fields.items() if n not in values and (f.default, f.default_factory) == nothing]
    if missing:
        raise PeftMoeError(f"{place or 'the settings'} lack {missing}; add them to the file, or use --set")
    return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


def _domains(given: Any, unseen: Sequence[str]) -> dict[str, Domain]:
    if isinstance(given, Mapping):
        found = {name: _build(Domain, files, f"domains.{name}.") for name, files in given.items()}
        found = {n: Domain(Path(d.test), Path(d.train) if d.train else None) for n, d in found.items()}
    else:
        folders = sorted(p.parent for p in Path(given).glob("*/test.jsonl"))
        found = {
            p.name: Domain(p / "test.jsonl", p / "train.jsonl" if (p / "train.jsonl").is_file() else None)
            for p in folders
        }
        if not found:
            raise PeftMoeError(f"domains={given!r}: no <domain>/test.jsonl in that folder")
    for name in unseen:
        if name not in found:
            raise PeftMoeError(f"unseen={name!r} is no domain.{near_matches(name, found)}")
        found[name] = Domain(found[name].test)
    for domain in found.values():
        for path in (domain.test, domain.train):
            if path is not None and not path.is_file():
                raise PeftMoeError(f"{path}: no such file (working directory: {Path.cwd()})")
    return found


def _anchor(raw: dict[str, Any], folder: Path) -> None:
    """Make the file's relative paths start from its folder; what does not lie there is left (Hub ids)."""

    def near(value: Any) -> Any:
        found = isinstance(value, str) and not Path(value).is_absolute() and (folder / value).exists()
        return str(folder / value) if found else value

    raw["base"] = near(raw.get("base")) if "base" in raw else None
    if raw["base"] is None:
        raw.pop("base")
    for key in ("experts", "domains"):
        if isinstance(raw.get(key), dict):
            raw[key] = {
                n: {k: near(p) for k, p in v.items()} if isinstance(v, dict) else near(v)
                for n, v in raw[key].items()
            }
        elif key in raw:
            raw[key] = near(raw[key])


def _put(raw: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = raw.get(key)
        raw = raw.setdefault(key, {}) if inner is None or isinstance(inner, dict) else {}
    raw[keys[-1]] = value
