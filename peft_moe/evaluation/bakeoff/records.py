"""Scores on disk: one file per method and seed, reused while its settings are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...io.json_files import write_json
from ..score import TurnScore
from .build import Cost
from .methods import Method
from .settings import Settings
from .texts import Texts, digest

Scores = dict[str, list[list[TurnScore]]]
"""Row → for each text, the scores of the turns that count."""

HASHED_BYTES = 64 * 2**20
"""Number of bytes of a file that its hash covers; the hash of a larger file also names its size."""


@dataclass(frozen=True)
class Record:
    """The result of one run of one method.

    Attributes:
        method: the method's name.
        seed: the seed of the run.
        settings: hash of everything that determines the scores.
        cost: cost of building and scoring the method.
        scores: scores per row, text and turn.
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
    """Hashes of everything that determines a method's scores.

    A hash covers the files of the base and of the adapters, the texts, and the budgets that the method uses.
    It leaves out the batch size of scoring, the bootstrap draws, and the code: after a change of code, delete
    the score files that it affects.
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

    def of(self, method: Method, seed: int) -> str:
        """Return the hash for one method and seed."""
        parts: dict[str, Any] = {"common": self.common, "method": method.identity(), "seed": seed}
        if method.fit is not None or method.train:
            parts["samples"] = self.samples
        if method.train:
            parts["train"] = asdict(self.settings.train)
        if method.routers_budget:
            parts["learning_rate"] = self.settings.width.learning_rate
        if method.own_budget:
            parts |= {"samples": self.pool, "width": asdict(self.settings.width)}
            parts["train"] = [self.settings.train.max_length, self.settings.train.bf16]
        return digest(parts)


def fingerprint(source: str) -> Any:
    """Return size and content hash of each weights or config file of a folder; a Hub id stands for itself."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".json"))
    return {p.name: _file_hash(p) for p in files if p.name != "summary.json"}


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return f"{path.stat().st_size}-{hashlib.sha256(file.read(HASHED_BYTES)).hexdigest()[:16]}"


def record_path(out: Path, method: Method, seed: int) -> Path:
    """Return the file of a run's scores."""
    return out / "scores" / f"{method.file_stem}-{seed}.json"


def write_record(path: Path, record: Record, versions: Mapping[str, str]) -> None:
    """Write a run's scores, with the versions of the packages that made them."""
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
    """Read a run's scores; None if the file is missing, unreadable or made under other settings."""
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
