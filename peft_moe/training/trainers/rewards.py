"""Rewards that a recipe can name; they compare each completion with the right answer to its prompt."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...errors import PeftMoeError, near_matches

Reward = Callable[..., list[float]]


def exact(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float]:
    """Return 1 for each completion that equals the answer, apart from surrounding white space, and else 0."""
    return [float(_text(c) == _text(a)) for c, a in zip(completions, answer, strict=True)]


def overlap(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float]:
    """Return the share of positions at which completion and answer have the same character.

    The share is of the longer text, so that it is 1 only for equal texts. It ranks wrong completions, where
    ``exact`` gives all completions of a group the same reward, from which GRPO learns nothing.
    """
    pairs = [(_text(c), _text(a)) for c, a in zip(completions, answer, strict=True)]
    return [
        sum(x == y for x, y in zip(text, right, strict=False)) / max(len(text), len(right), 1)
        for text, right in pairs
    ]


REWARDS: dict[str, Reward] = {"exact": exact, "overlap": overlap}


def reward_named(name: str) -> Reward:
    """Return a reward by its name, or a user's function as ``file.py:function``.

    Raises:
        PeftMoeError: the name, the file or the function in it does not exist.
    """
    if name in REWARDS:
        return REWARDS[name]
    file, _, function = name.rpartition(":")
    path = Path(file).expanduser()
    if not file.endswith(".py") or not path.is_file():
        raise PeftMoeError(
            f"rewards: {name!r} is neither a reward nor a function in a file (rewards.py:my_reward)."
            f"{near_matches(name, REWARDS)}"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loaded = getattr(module, function, None)
    if not callable(loaded):
        options = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise PeftMoeError(f"rewards: {path} has no function {function!r}.{near_matches(function, options)}")
    reward: Reward = loaded
    return reward


def _text(value: Any) -> str:
    """Return a completion's text, which in a chat is the content of the last message."""
    return str(value if isinstance(value, str) else value[-1]["content"]).strip()
