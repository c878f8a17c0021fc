"""The one exception that users meet, and the wording helpers that every refusal shares."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
