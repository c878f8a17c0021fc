"""The predicates for values accept the right form and nothing else, whatever object they are asked about."""

from __future__ import annotations

import math
import re

import pytest

from peft_moe.io.values import (
    dict_of,
    filled_list_of,
    is_bool,
    is_count,
    is_finite,
    is_index,
    is_not_negative,
    is_number,
    is_positive,
    is_regex,
    is_share,
    is_word,
    list_of,
    optional,
)

BEYOND_FLOATS = 10**400
VALUES = {
    "-1": -1, "0": 0, "1": 1, "0.5": 0.5, "inf": math.inf, "nan": math.nan, "beyond": BEYOND_FLOATS,
    "True": True, "False": False, "None": None, "text": "a", "empty text": "", "bad regex": "(",
    "bytes": b"a", "pattern": re.compile("a"), "list": [1], "empty list": [], "dict": {"a": 1},
}  # fmt: skip
ACCEPTED = {
    is_number: {"-1", "0", "1", "0.5", "inf", "nan", "beyond"},
    is_finite: {"-1", "0", "1", "0.5"},
    is_positive: {"1", "0.5"},
    is_not_negative: {"0", "1", "0.5"},
    is_share: {"0.5"},
    is_index: {"0", "1", "beyond"},
    is_count: {"1", "beyond"},
    is_bool: {"True", "False"},
    is_word: {"text", "bad regex"},
    is_regex: {"text"},
    optional(is_count, is_word): {"None", "1", "beyond", "text", "bad regex"},
    list_of(is_count): {"list", "empty list"},
    filled_list_of(is_count): {"list"},
    dict_of(is_word, is_count): {"dict"},
}


@pytest.mark.parametrize("predicate", ACCEPTED, ids=[p.__qualname__ for p in ACCEPTED])
def test_a_predicate_accepts_exactly_these(predicate):
    assert {name for name, value in VALUES.items() if predicate(value)} == ACCEPTED[predicate]


def test_items_count_one_by_one():
    assert not list_of(is_count)([1, 0])
    assert not filled_list_of(is_count)([1, True])
    assert not dict_of(is_word, is_count)({"a": 1, "": 1})
    assert not dict_of(is_regex, is_count)({"(": 1})
    assert list_of(is_word)({"a", "b"})
    assert list_of(is_word)(("a",))
