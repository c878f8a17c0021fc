"""Predicates for values that come from files and callers: each tells whether one value has the right form.

They accept any object and never raise. ``True`` and ``False`` do not count as numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

Predicate = Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Whether the value is an int or a float, which may be infinite or NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether the value is a finite number that a float can hold."""
    try:
        return is_number(value) and math.isfinite(value)
    except OverflowError:  # an int beyond the range of floats
        return False


def is_positive(value: Any) -> bool:
    """Whether the value is a finite number above 0."""
    return is_finite(value) and bool(value > 0)


def is_not_negative(value: Any) -> bool:
    """Whether the value is a finite number of at least 0."""
    return is_finite(value) and bool(value >= 0)


def is_share(value: Any) -> bool:
    """Whether the value is a number above 0 and below 1."""
    return is_finite(value) and bool(0 < value < 1)


def is_index(value: Any) -> bool:
    """Whether the value is a whole number of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_count(value: Any) -> bool:
    """Whether the value is a whole number of at least 1."""
    return is_index(value) and bool(value >= 1)


def is_bool(value: Any) -> bool:
    """Whether the value is ``True`` or ``False``."""
    return isinstance(value, bool)


def is_word(value: Any) -> bool:
    """Whether the value is text and not empty."""
    return isinstance(value, str) and bool(value)


def is_regex(value: Any) -> bool:
    """Whether the value is text that compiles as a regular expression, and not empty."""
    if not is_word(value):
        return False
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def optional(*choices: Predicate) -> Predicate:
    """Return a predicate that accepts None and whatever one of the ``choices`` accepts."""
    return lambda value: value is None or any(valid(value) for valid in choices)


def list_of(valid: Predicate) -> Predicate:
    """Return a predicate that accepts lists, tuples and sets of valid items, also empty ones."""
    return lambda value: isinstance(value, list | tuple | set) and all(valid(item) for item in value)


def filled_list_of(valid: Predicate) -> Predicate:
    """Return a predicate that accepts lists and tuples of at least one item, all valid."""
    return lambda value: isinstance(value, list | tuple) and bool(value) and all(map(valid, value))


def dict_of(valid_key: Predicate, valid_value: Predicate) -> Predicate:
    """Return a predicate that accepts dicts of valid keys and values, also empty ones."""
    return lambda value: (
        isinstance(value, dict) and all(valid_key(key) and valid_value(item) for key, item in value.items())
    )
