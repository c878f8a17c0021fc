"""Training rows: questions one after another, with a weight per token for the loss."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import torch

from peft_moe.cli.demo.skills import (
    BASE_SKILLS_HELD_OUT,
    BASE_SKILLS_SEEN,
    EXPERTS,
    REFUSAL,
    Sample,
    generate,
)

Rows = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
BASE_SKILLS = BASE_SKILLS_SEEN + BASE_SKILLS_HELD_OUT

# The base reads all questions, the experts' too, but no answer of an expert's skill is a target:
# it knows the language of the questions, not how to answer them. To every other such question it
# learns to answer REFUSAL; else its last hidden state would not tell what it cannot answer.
PROMPT_WEIGHT = 0.1

# Skills that the base is slow to learn; the later phases of its training ask them more often.
SLOW_SKILLS = (
    "copy", "capitals", "with_dots", "double_letters", "drop_vowels", "drop_first", "plural",
    "largest", "smallest", "even_odd", "times_ten", "amount_of", "next_letter", "repeat_word",
    "count_letters", "month_after",
)  # fmt: skip


def base_rows(tokenizer, seed: int, slow_share: float) -> Rows:
    """Rows for the base: its own skills and, refused or as context, some experts' questions.

    ``slow_share`` of the questions are of `SLOW_SKILLS`, beyond those drawn from all skills.
    """

    def choose(rng: random.Random, previous: str | None) -> str:
        if previous is not None and rng.random() < 0.2:
            return previous
        if rng.random() < slow_share:
            return rng.choice(SLOW_SKILLS)
        return rng.choice(EXPERTS if rng.random() < 0.2 else BASE_SKILLS)

    def weigh(rng: random.Random, sample: Sample) -> tuple[str, float, float]:
        if sample.domain in BASE_SKILLS:
            return sample.completion, PROMPT_WEIGHT, 1.0
        if rng.random() < 0.5:
            return REFUSAL, PROMPT_WEIGHT, 1.0
        return sample.completion, PROMPT_WEIGHT, 0.0

    return _rows(tokenizer, seed, choose, weigh)


def expert_rows(tokenizer, name: str, seed: int) -> Rows:
    """Rows for an expert: its own answers have a loss; other finished turns are context."""
    others = [other for other in EXPERTS if other != name]

    def choose(rng: random.Random, previous: str | None) -> str:
        if rng.random() < (0.75 if previous is None else 0.65):
            return name
        return rng.choice(others if rng.random() < 0.5 else BASE_SKILLS)

    def weigh(rng: random.Random, sample: Sample) -> tuple[str, float, float]:
        return sample.completion, 0.0, float(sample.domain == name)

    return _rows(tokenizer, seed, choose, weigh)


def _rows(tokenizer, seed, choose, weigh) -> Rows:
    rng = random.Random(seed)
    streams = {name: _stream(name, seed) for name in EXPERTS + BASE_SKILLS}

    def row(length: int) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        weights: list[float] = []
        previous = None
        while len(ids) < length:
            previous = choose(rng, previous)
            sample = next(streams[previous])
            answer, on_prompt, on_answer = weigh(rng, sample)
            for text, weight in ((sample.prompt, on_prompt), (answer, on_answer)):
                tokens = tokenizer(text).input_ids
                ids += tokens
                weights += [weight] * len(tokens)
        return ids[:length], weights[:length]

    def rows(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids, weights = zip(*(row(length) for _ in range(batch)), strict=True)
        return torch.tensor(ids), torch.tensor(weights)

    return rows


def _stream(name: str, seed: int) -> Iterator[Sample]:
    """Endless training samples of a skill."""
    block = 0
    while True:
        yield from generate(name, 256, seed=1000 * seed + block)
        block += 1
