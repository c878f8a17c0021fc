"""What a question with an exactly checkable answer is, and how skills describe theirs."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from .arguments import WORDS, Fields

MARKER = " = "
"""Every prompt ends in it, so that the end of a prompt says nothing about its skill."""

STOP = "\n"
"""Every completion ends in it; it is also the tokenizer's end-of-sequence token."""

Split = Literal["train", "test"]

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
    whole prompt, for skills such as the next weekday that have few possible arguments. The few
    words of `WORDS` are always split by prompt; kept from training altogether, they would test
    whether a model copies words that it has learnt to take for a part of the question.
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
            few = self.split_on == "prompt" or fields["x"] in WORDS
            if split_of(prompt if few else "|".join(fields.values())) == split:
                return Sample(prompt, answer + STOP, self.name)


def split_of(key: str) -> Split:
    """The split of ``key``: a fixed function of its characters, the same in every process."""
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return "test" if int.from_bytes(digest, "big") % _TEST_SHARE == 0 else "train"


def write_jsonl(path: str | Path, samples: Iterable[Sample]) -> None:
    """Write ``samples`` as JSON lines with the keys prompt, completion and domain."""
    lines = (json.dumps(asdict(sample)) + "\n" for sample in samples)
    Path(path).write_text("".join(lines), encoding="utf-8")
