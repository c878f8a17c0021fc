"""Training samples of the demo's router, and the texts that the demo scores."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .skills import BASE_SKILLS_HELD_OUT, BASE_SKILLS_SEEN, EXPERTS, Sample, generate, label, two_skill

Turns = list[Sample]

TWO_SKILLS = "two skills"
BASE_SKILLS = "base's skills"
UNSEEN_SKILLS = "unseen skills"


def router_samples(per_expert: int, seed: int) -> list[dict[str, str]]:
    """Draw the router's training samples: as many of the base's skills as of the experts'.

    The skills in ``BASE_SKILLS_HELD_OUT`` do not occur.

    Returns:
        Dicts with ``prompt``, ``completion`` and ``domain``: an expert's name, or "base".
    """
    per_base_skill = -(-per_expert * len(EXPERTS) // len(BASE_SKILLS_SEEN))
    counts = dict.fromkeys(EXPERTS, per_expert) | dict.fromkeys(BASE_SKILLS_SEEN, per_base_skill)
    rows = [
        {"prompt": s.prompt, "completion": s.completion, "domain": label(s.domain)}
        for name, count in counts.items()
        for s in generate(name, count, seed)
    ]
    random.Random(seed).shuffle(rows)
    return rows


def test_texts(per_domain: int, seed: int) -> dict[str, list[Turns]]:
    """Draw test texts for each column of the demo's table; no training has seen them.

    Args:
        per_domain: texts per column.
        seed: seed of the draw.
    """
    texts = {name: [[s] for s in generate(name, per_domain, seed, "test")] for name in EXPERTS}
    texts[BASE_SKILLS] = _spread(BASE_SKILLS_SEEN, per_domain, seed)
    texts[UNSEEN_SKILLS] = _spread(BASE_SKILLS_HELD_OUT, per_domain, seed)
    pairs = [(a, b) for a in EXPERTS for b in EXPERTS if a != b]
    per_pair = -(-per_domain // len(pairs))
    texts[TWO_SKILLS] = [text for a, b in pairs for text in two_skill(a, b, per_pair, seed, "test")]
    return texts


def _spread(names: Sequence[str], count: int, seed: int) -> list[Turns]:
    per_skill = -(-count // len(names))
    return [[sample] for name in names for sample in generate(name, per_skill, seed, "test")]


def as_text(turns: Turns) -> list[tuple[str, str]]:
    """Return turns in the form that `score_texts` reads."""
    return [(turn.prompt, turn.completion) for turn in turns]
