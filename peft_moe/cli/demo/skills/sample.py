"""A question whose answer can be checked exactly, and the skill that draws questions."""

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
"""The end of every prompt, so that the end of a prompt does not reveal its skill."""

STOP = "\n"
"""The end of every completion, and the tokenizer's end-of-sequence token."""

Split = Literal["train", "test"]

_TEST_SHARE = 5  # one argument of five belongs to the test split


@dataclass(frozen=True)
class Sample:
    """One question and its answer.

    Attributes:
        prompt: the question; it ends in `MARKER`.
        completion: the answer; it ends in `STOP`.
        domain: name of the skill.
    """

    prompt: str
    completion: str
    domain: str

    @property
    def text(self) -> str:
        """Prompt and completion."""
        return self.prompt + self.completion

    def accepts(self, answer: str) -> bool:
        """Return whether an answer is exactly right, with or without the stop character."""
        return answer.removesuffix(STOP) == self.completion.removesuffix(STOP)


@dataclass(frozen=True)
class Skill:
    """A kind of question.

    Attributes:
        name: the skill's name.
        phrasings: templates of the question.
        draw: function that returns the fields for a phrasing, and the answer.
        split_on: what decides between train and test. "fields": test arguments never occur in training.
            "prompt": test prompts never occur in training, for skills with few possible arguments, such as
            the next weekday. The words of `WORDS` are always split by prompt. If training lacked them, a
            model would read them only as parts of questions, and the test would measure whether it can
            copy these.
    """

    name: str
    phrasings: tuple[str, ...]
    draw: Callable[[random.Random], tuple[Fields, str]]
    split_on: Literal["fields", "prompt"] = "fields"

    def sample(self, rng: random.Random, split: Split) -> Sample:
        """Draw samples until one belongs to ``split``, and return it."""
        while True:
            fields, answer = self.draw(rng)
            prompt = rng.choice(self.phrasings).format(**fields) + MARKER
            by_prompt = self.split_on == "prompt" or fields["x"] in WORDS
            if split_of(prompt if by_prompt else "|".join(fields.values())) == split:
                return Sample(prompt, answer + STOP, self.name)


def split_of(key: str) -> Split:
    """Return the split of ``key``, a fixed function of its characters, the same in every process."""
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return "test" if int.from_bytes(digest, "big") % _TEST_SHARE == 0 else "train"


def write_jsonl(path: str | Path, samples: Iterable[Sample]) -> None:
    """Write ``samples`` as JSON lines with the keys prompt, completion and domain."""
    lines = (json.dumps(asdict(sample)) + "\n" for sample in samples)
    Path(path).write_text("".join(lines), encoding="utf-8")
