"""Scores on disk: one file per method and seed, found again when its settings are the same."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..score import TurnScore
from .build import Cost
from .methods import Method
from .settings import Settings
from .texts import Texts, digest

Scores = dict[str, list[list[TurnScore]]]
"""Row → for each text, the turns that count."""

WHOLE = 64 * 2**20
"""Files up to this size are hashed whole; of larger ones the first part and the size."""


@dataclass(frozen=True)
class Record:
    """What one run of one method left.

    Attributes:
        method: its name.
        seed: of its run.
        settings: hash of everything that decides the scores.
        cost: of making and scoring it.
        scores: per row, text and turn.
    """

    method: str
    seed: int
    settings: str
    cost: Cost
    scores: Scores


@dataclass
class Outcome:
    """The scores of a run, before any statistics.

    Attributes:
        methods: every method that has scores, references first.
        records: name → one record per seed.
        notes: name → why a method has no scores.
        failed: names of methods that raised an unexpected error, not a refusal.
        reused: how many records were read from disk.
    """

    methods: list[Method]
    records: dict[str, list[Record]]
    notes: dict[str, str]
    failed: list[str]
    reused: int


class Fingerprints:
    """Hashes of what decides a method's scores.

    Base and adapters count by their files, texts by their words; batch sizes of scoring, bootstrap draws
    and the budgets of what a method does not do count nothing. Code does not count: after a change of it,
    delete the score files that it concerns.
    """

    def __init__(self, settings: Settings, texts: Texts) -> None:
        self.settings = settings
        self.common = digest(
            {
                "base": fingerprint(settings.base),
                "experts": {name: fingerprint(source) for name, source in settings.experts.items()},
                "rows": [[row.name, row.texts, row.owners] for row in texts.rows],
                "max_length": settings.score.max_length,
                "dtype": settings.dtype,
            }
        )
        self.samples, self.pool = digest(texts.train), digest(texts.pool)

    def of(self, one: Method, seed: int) -> str:
        """The hash for one method and seed."""
        parts: dict[str, Any] = {"common": self.common, "method": one.identity(), "seed": seed}
        if one.fit is not None or one.train:
            parts["samples"] = self.samples
        if one.train:
            parts["train"] = asdict(self.settings.train)
        if one.routers_budget:
            parts["learning_rate"] = self.settings.width.learning_rate
        if one.own_budget:
            parts |= {"samples": self.pool, "width": asdict(self.settings.width)}
            parts["train"] = [self.settings.train.max_length, self.settings.train.bf16]
        return digest(parts)


def fingerprint(source: str) -> Any:
    """Of a folder: the weights and configs in it, by size and content; a Hub id stands for itself."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".json"))
    return {p.name: _file_hash(p) for p in files if p.name != "summary.json"}


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return f"{path.stat().st_size}-{hashlib.sha256(file.read(WHOLE)).hexdigest()[:16]}"


def record_path(out: Path, one: Method, seed: int) -> Path:
    """Where a run's scores lie."""
    return out / "scores" / f"{one.file_stem}-{seed}.json"


def write_json(path: Path, data: Any, indent: int | None = None) -> None:
    """Written beside and renamed: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(data, indent=indent) + "\n", encoding="utf-8")
    os.replace(beside, path)


def write_record(path: Path, record: Record, versions: Mapping[str, str]) -> None:
    """Keep a run's scores."""
    rows = {
        row: [[[t.nll, t.tokens, int(t.exact)] for t in turns] for turns in texts]
        for row, texts in record.scores.items()
    }
    data = {
        "method": record.method,
        "seed": record.seed,
        "settings": record.settings,
        "versions": dict(versions),
        "cost": asdict(record.cost),
        "turns": "[negative log-likelihood, tokens, exact]",
        "scores": rows,
    }
    write_json(path, data)


def read_record(path: Path, settings: str) -> Record | None:
    """A run's scores, if they are there and were made under the same settings."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    if data.get("settings") != settings:
        return None
    scores = {
        row: [[TurnScore(float(nll), int(n), bool(hit)) for nll, n, hit in turns] for turns in texts]
        for row, texts in data["scores"].items()
    }
    return Record(data["method"], data["seed"], settings, Cost(**data["cost"]), scores)
