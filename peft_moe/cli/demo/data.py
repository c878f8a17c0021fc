"""What the demo trains its router on, and what it scores: questions of experts, of the base, of neither."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .skills import BASE_SKILLS_HELD_OUT, BASE_SKILLS_SEEN, EXPERTS, Sample, generate, label, two_skill

Turns = list[Sample]

TWO_SKILLS = "two skills"
BASE_SKILLS = "base's skills"
UNSEEN_SKILLS = "unseen skills"


def router_samples(per_expert: int, seed: int) -> list[dict[str, str]]:
    """Labelled prompts and completions for the router: as many of the base's skills as of the experts'.

    The skills in ``BASE_SKILLS_HELD_OUT`` do not occur.

    Returns:
        Dicts with ``prompt``, ``completion`` and ``domain``: an expert's name, or "base".
    """
    generic = -(-per_expert * len(EXPERTS) // len(BASE_SKILLS_SEEN))
    wanted = [(name, per_expert) for name in EXPERTS] + [(name, generic) for name in BASE_SKILLS_SEEN]
    rows = [
        {"prompt": s.prompt, "completion": s.completion, "domain": label(s.domain)}
        for name, count in wanted
        for s in generate(name, count, seed)
    ]
    random.Random(seed).shuffle(rows)
    return rows


def test_texts(per_domain: int, seed: int) -> dict[str, list[Turns]]:
    """Fresh texts per row of the demo's table, never seen in any training.

    Args:
        per_domain: questions of each expert's skill; as many for each other row.
        seed: of the draw.
    """
    texts = {name: [[s] for s in generate(name, per_domain, seed, "test")] for name in EXPERTS}
    texts[BASE_SKILLS] = _spread(BASE_SKILLS_SEEN, per_domain, seed)
    texts[UNSEEN_SKILLS] = _spread(BASE_SKILLS_HELD_OUT, per_domain, seed)
    pairs = [(a, b) for a in EXPERTS for b in EXPERTS if a != b]
    each = -(-per_domain // len(pairs))
    texts[TWO_SKILLS] = [text for a, b in pairs for text in two_skill(a, b, each, seed, "test")]
    return texts


def _spread(names: Sequence[str], count: int, seed: int) -> list[Turns]:
    each = -(-count // len(names))
    return [[sample] for name in names for sample in generate(name, each, seed, "test")]


def as_text(turns: Turns) -> list[tuple[str, str]]:
    """Turns as the scorer reads them."""
    return [(turn.prompt, turn.completion) for turn in turns]
