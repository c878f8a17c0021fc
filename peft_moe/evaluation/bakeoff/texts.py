"""The texts of a bake-off: the rows to score, and the samples to fit and train on."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import PeftMoeError
from ..score import Text
from .settings import Settings

Sample = dict[str, str]
MARKED, RUNNING = "two domains, marked", "two domains, running"


@dataclass(frozen=True)
class Row:
    """Texts of one kind, which make one column of the table.

    Attributes:
        name: a domain's name, `MARKED` or `RUNNING`.
        kind: "expert", "generic", "unseen" or "mixed".
        texts: one list of turns (prompt, completion) per text.
        owners: per text and turn that counts, the expert of the turn's domain; None if it has no expert.
    """

    name: str
    kind: str
    texts: list[Text]
    owners: list[list[str | None]]

    @property
    def marked(self) -> bool:
        """Whether the model sees where each turn begins."""
        return self.name != RUNNING


@dataclass(frozen=True)
class Texts:
    """All texts, read from files.

    Attributes:
        rows: texts to score.
        train: samples with prompt, completion and domain, in one random order for all methods.
        pool: all training samples of all domains, for the wide LoRA.
    """

    rows: list[Row]
    train: list[Sample]
    pool: list[Sample]


def load_texts(settings: Settings) -> Texts:
    """Read the files of all domains, draw samples, and make the texts of two domains.

    The draw depends only on the domain's name: a larger number of texts contains those of a smaller one.

    Raises:
        PeftMoeError: a file is empty, or a record lacks its prompt or completion.
    """
    plan = settings.texts
    test = {n: _draw(read_samples(d.test, n), plan.test_records, n) for n, d in settings.domains.items()}
    pools = {n: read_samples(d.train, n) for n, d in settings.domains.items() if d.train is not None}
    rows = []
    for name, samples in test.items():
        owner = name if name in settings.experts else None
        kind = "expert" if owner else ("generic" if name in pools else "unseen")
        turns: list[Text] = [[(s["prompt"], s["completion"])] for s in samples]
        rows.append(Row(name, kind, turns, [[owner]] * len(turns)))
    position = {name: number for number, name in enumerate(settings.experts)}
    rows.sort(key=lambda row: (("expert", "generic", "unseen").index(row.kind), position.get(row.name, 0)))
    rows += _mixed(settings, test)
    train = [s for n, pool in pools.items() for s in _draw(pool, _sample_count(settings, n), n)]
    random.Random("order").shuffle(train)
    return Texts(rows, train, [sample for pool in pools.values() for sample in pool])


def _sample_count(settings: Settings, name: str) -> int:
    plan = settings.texts
    generic = plan.train_records if plan.generic_records is None else plan.generic_records
    return plan.train_records if name in settings.experts else generic


def _mixed(settings: Settings, test: dict[str, list[Sample]]) -> list[Row]:
    count, chars = settings.texts.mixed_per_pair, settings.texts.mixed_chars
    texts: list[Text] = []
    pairs: list[tuple[str, str]] = []
    for first in settings.experts:
        for second in settings.experts:
            if first == second:
                continue
            for number in range(count):
                # The second index is shifted so that texts with equal numbers do not always meet.
                before, after = test[first], test[second]
                turns = before[number % len(before)], after[(number + 1) % len(after)]
                texts.append([(s["prompt"], s["completion"][:chars]) for s in turns])
                pairs.append((first, second))
    if not texts:
        return []
    return [
        Row(MARKED, "mixed", texts, [[a, b] for a, b in pairs]),
        Row(RUNNING, "mixed", texts, [[b] for _, b in pairs]),
    ]


def read_samples(path: Path, domain: str) -> list[Sample]:
    """Read the records of a JSON lines file as samples of ``domain``.

    Raises:
        PeftMoeError: the file is empty, or a line is not JSON or lacks ``prompt`` or ``completion`` as text.
    """
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise PeftMoeError(f"{path}, line {number} is not JSON ({error})") from None
        texts = [record.get(key) if isinstance(record, dict) else None for key in ("prompt", "completion")]
        if not all(isinstance(text, str) for text in texts) or not texts[1]:
            raise PeftMoeError(
                f"{path}, line {number}: a bake-off reads records with the texts `prompt` and `completion` "
                f"(not empty), and this one has {sorted(record) if isinstance(record, dict) else record!r}"
            )
        samples.append({"prompt": texts[0], "completion": texts[1], "domain": domain})
    if not samples:
        raise PeftMoeError(f"{path} is empty; write records with `prompt` and `completion` to it")
    return samples


def _draw(samples: list[Sample], count: int, name: str) -> list[Sample]:
    order = list(samples)
    random.Random(f"draw {name}").shuffle(order)
    return order[:count]


def digest(data: Any) -> str:
    """Return a short hash of plain data."""
    text = json.dumps(data, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def count_tokens(rows: Iterable[Row], tokenizer: Any, max_length: int | None) -> dict[str, int]:
    """Count the tokens, prompts included, that scoring each row reads."""
    counts = {}
    for row in rows:
        texts = ["".join(prompt + completion for prompt, completion in text) for text in row.texts]
        lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]] if texts else []
        counts[row.name] = sum(min(n, max_length) if max_length else n for n in lengths)
    return counts
