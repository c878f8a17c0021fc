"""The one exception that users meet, and the wording helpers that every refusal shares."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = 120


class PeftMoeError(ValueError):
    """A refusal: the message holds the field or file, its value, the reason and the fix."""


def near_matches(word: str, options: Iterable[str]) -> str:
    """``" Did you mean 'linear'?"`` for a misspelt name, with all options behind it.

    Args:
        word: what the user wrote.
        options: the names that exist.

    Returns:
        A sentence that begins with a space, so that it can follow any message.
    """
    names = sorted(options)
    close = difflib.get_close_matches(str(word), names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
    return f"{hint} Available: {', '.join(names)}."


def shown(value: Any) -> str:
    """Return ``repr(value)``, shortened: a damaged config must not fill the screen."""
    return _shorten.repr(value)


def refusal(expert: str, reason: str, fix: str) -> PeftMoeError:
    """Make the refusal of an expert: two lines, the reason and the fix.

    Args:
        expert: the expert's name.
        reason: field or file, its value and the reason, without a final stop.
        fix: what the user can do, without a final stop.

    Returns:
        The error, to be raised by the caller.
    """
    return PeftMoeError(f"Expert {shown(expert)}: {reason}.\nFix: {fix}.")
