"""The demo's skills by name, and seeded samples of them."""

from __future__ import annotations

import difflib
import random

from .experts import EXPERT_SKILLS
from .number_skills import NUMBER_SKILLS
from .sample import STOP, Sample, Skill, Split
from .text_skills import TEXT_SKILLS

EXPERTS: tuple[str, ...] = tuple(skill.name for skill in EXPERT_SKILLS)
"""The skills of the experts, one LoRA each; the base lacks them."""

BASE_SKILLS_HELD_OUT: tuple[str, ...] = (
    "last_letter", "repeat_word", "smallest", "month_of", "day_before",
)  # fmt: skip
"""Skills of the base that no router sees in training. They test whether it leaves them to the base."""

BASE_SKILLS_SEEN: tuple[str, ...] = tuple(
    skill.name for skill in TEXT_SKILLS + NUMBER_SKILLS if skill.name not in BASE_SKILLS_HELD_OUT
)
"""Skills of the base that a router may be trained on, as generic data."""

REFUSAL = "?" + STOP
"""The answer that the base is trained to give to half of the experts' questions in its training."""

BASE = "base"
"""The label of every skill without an expert."""

_SKILLS: dict[str, Skill] = {skill.name: skill for skill in EXPERT_SKILLS + TEXT_SKILLS + NUMBER_SKILLS}


def skill(domain: str) -> Skill:
    """Return the skill of that name.

    Raises:
        ValueError: there is no such skill; the message lists similar names.
    """
    if domain not in _SKILLS:
        near = difflib.get_close_matches(domain, _SKILLS) or sorted(_SKILLS)
        raise ValueError(f"Unknown skill {domain!r}; use one of: {', '.join(near)}.")
    return _SKILLS[domain]


def label(domain: str) -> str:
    """Return the expert that has the skill ``domain``, or `BASE`."""
    return domain if domain in EXPERTS else BASE


def generate(domain: str, n: int, seed: int, split: Split = "train") -> list[Sample]:
    """Draw ``n`` samples of a skill, the same in every process. Prompts may repeat within a split.

    No prompt of ``split="test"`` occurs in ``split="train"``.
    """
    drawn_skill, rng = skill(domain), _rng(seed, split, domain)
    return [drawn_skill.sample(rng, split) for _ in range(n)]


def two_skill(first: str, second: str, n: int, seed: int, split: Split = "train") -> list[list[Sample]]:
    """Draw ``n`` texts of two turns: a question of skill ``first``, then one of ``second``."""
    rng = _rng(seed, split, first, second)
    return [[skill(name).sample(rng, split) for name in (first, second)] for _ in range(n)]


def flatten(turns: list[Sample]) -> Sample:
    """Join turns into one sample whose prompt holds the earlier turns and the last question."""
    *earlier, last = turns
    context = "".join(turn.text for turn in earlier)
    return Sample(context + last.prompt, last.completion, last.domain)


def _rng(seed: int, *names: str) -> random.Random:
    # random.Random hashes a string seed with SHA-512, so the draw does not depend on PYTHONHASHSEED.
    return random.Random(":".join((str(seed), *names)))
