"""What a question with an exactly checkable answer is, and how skills describe theirs."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

MARKER = " = "
"""Every prompt ends in it, so that the end of a prompt says nothing about its skill."""

STOP = "\n"
"""Every completion ends in it; it is also the tokenizer's end-of-sequence token."""

Split = Literal["train", "test"]
Fields = dict[str, str]

_TEST_SHARE = 5  # one argument in five belongs to the test split


@dataclass(frozen=True)
class Sample:
    """One question: ``prompt`` ends in `MARKER`, ``completion`` in `STOP`.

    ``domain`` is the name of the skill that answers it.
    """

    prompt: str
    completion: str
    domain: str

    @property
    def text(self) -> str:
        """The finished turn."""
        return self.prompt + self.completion

    def accepts(self, answer: str) -> bool:
        """Exact match, with or without the stop character."""
        return answer.removesuffix(STOP) == self.completion.removesuffix(STOP)


@dataclass(frozen=True)
class Skill:
    """A kind of question.

    ``draw`` returns the fields that fill a phrasing, and the answer. ``split_on`` says what
    decides between train and test: the fields (test arguments never occur in training), or the
    whole prompt, for skills such as the next weekday that have few possible arguments.
    """

    name: str
    phrasings: tuple[str, ...]
    draw: Callable[[random.Random], tuple[Fields, str]]
    split_on: Literal["fields", "prompt"] = "fields"

    def sample(self, rng: random.Random, split: Split) -> Sample:
        """One sample of ``split``; draws again until one falls into it."""
        while True:
            fields, answer = self.draw(rng)
            prompt = rng.choice(self.phrasings).format(**fields) + MARKER
            key = prompt if self.split_on == "prompt" else "|".join(fields.values())
            if split_of(key) == split:
                return Sample(prompt, answer + STOP, self.name)


def split_of(key: str) -> Split:
    """The split of ``key``: a fixed function of its characters, the same in every process."""
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return "test" if int.from_bytes(digest, "big") % _TEST_SHARE == 0 else "train"


def write_jsonl(path: str | Path, samples: Iterable[Sample]) -> None:
    """Write ``samples`` as JSON lines with the keys prompt, completion and domain."""
    lines = (json.dumps(asdict(sample)) + "\n" for sample in samples)
    Path(path).write_text("".join(lines), encoding="utf-8")
