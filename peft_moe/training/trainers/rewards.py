"""Rewards that a recipe can name: completions compared with the right answer of each prompt."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...errors import PeftMoeError, near_matches

Reward = Callable[..., list[float]]


def exact(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float]:
    """1 where a completion is the answer, but for white space around it; else 0."""
    return [float(_text(c) == _text(a)) for c, a in zip(completions, answer, strict=True)]


def overlap(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float]:
    """Share of places at which the answer's character stands, of the longer text; 1 only where all do.

    It tells wrong completions apart, where ``exact`` gives none of a group anything to learn from.
    """
    pairs = [(_text(c), _text(a)) for c, a in zip(completions, answer, strict=True)]
    return [
        sum(x == y for x, y in zip(one, other, strict=False)) / max(len(one), len(other), 1)
        for one, other in pairs
    ]


REWARDS: dict[str, Reward] = {"exact": exact, "overlap": overlap}


def reward_named(name: str) -> Reward:
    """A reward by its name, or of one's own as ``file.py:function``.

    Raises:
        PeftMoeError: there is none of that name, no such file, or no such function in it.
    """
    if name in REWARDS:
        return REWARDS[name]
    place, _, function = name.rpartition(":")
    path = Path(place).expanduser()
    if not place.endswith(".py") or not path.is_file():
        raise PeftMoeError(
            f"rewards: {name!r} is neither a reward nor a function in a file (rewards.py:my_reward)."
            f"{near_matches(name, REWARDS)}"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        options = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise PeftMoeError(f"rewards: {path} has no function {function!r}.{near_matches(function, options)}")
    reward: Reward = found
    return reward


def _text(value: Any) -> str:
    """A completion's text; of a chat, what the last message says."""
    return str(value if isinstance(value, str) else value[-1]["content"]).strip()
