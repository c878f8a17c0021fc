"""The demo's skills by name, and seeded samples of them."""

from __future__ import annotations

import difflib
import random

from .experts import EXPERT_SKILLS
from .number_skills import NUMBER_SKILLS
from .sample import STOP, Sample, Skill, Split
from .text_skills import TEXT_SKILLS

EXPERTS: tuple[str, ...] = tuple(skill.name for skill in EXPERT_SKILLS)
"""Skills that one LoRA each has and the base has not."""

BASE_SKILLS_HELD_OUT: tuple[str, ...] = (
    "last_letter", "repeat_word", "smallest", "month_of", "day_before",
)  # fmt: skip
"""Skills of the base that no router sees in training: does it leave them to the base?"""

BASE_SKILLS_SEEN: tuple[str, ...] = tuple(
    skill.name for skill in TEXT_SKILLS + NUMBER_SKILLS if skill.name not in BASE_SKILLS_HELD_OUT
)
"""Skills of the base that a router may be trained on, as generic data."""

REFUSAL = "?" + STOP
"""What the base is trained to answer to half of the experts' questions that it meets."""

BASE = "base"
"""The label of every skill that no expert has."""

_SKILLS: dict[str, Skill] = {skill.name: skill for skill in EXPERT_SKILLS + TEXT_SKILLS + NUMBER_SKILLS}


def skill(domain: str) -> Skill:
    """The skill of that name; ValueError with near matches if there is none."""
    if domain not in _SKILLS:
        near = difflib.get_close_matches(domain, _SKILLS) or sorted(_SKILLS)
        raise ValueError(f"Unknown skill {domain!r}; use one of: {', '.join(near)}.")
    return _SKILLS[domain]


def label(domain: str) -> str:
    """The expert that answers ``domain``, or `BASE`."""
    return domain if domain in EXPERTS else BASE


def generate(domain: str, n: int, seed: int, split: Split = "train") -> list[Sample]:
    """``n`` samples of a skill, the same in every process; prompts of a split may repeat.

    No prompt of ``split="test"`` is ever a prompt of ``split="train"``.
    """
    chosen, rng = skill(domain), _rng(seed, split, domain)
    return [chosen.sample(rng, split) for _ in range(n)]


def two_skill(first: str, second: str, n: int, seed: int, split: Split = "train") -> list[list[Sample]]:
    """``n`` texts of two turns: a question of skill ``first``, then one of ``second``."""
    rng = _rng(seed, split, first, second)
    return [[skill(name).sample(rng, split) for name in (first, second)] for _ in range(n)]


def flatten(turns: list[Sample]) -> Sample:
    """One sample whose prompt holds the finished earlier turns and the last question."""
    *earlier, last = turns
    context = "".join(turn.text for turn in earlier)
    return Sample(context + last.prompt, last.completion, last.domain)


def _rng(seed: int, *names: str) -> random.Random:
    # A string seed is hashed with SHA-512, so it does not depend on PYTHONHASHSEED.
    return random.Random(":".join((str(seed), *names)))
