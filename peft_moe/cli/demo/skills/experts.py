"""The skills of the experts. The base lacks them; each expert, one LoRA, has one of them."""

from __future__ import annotations

import random

from . import arguments
from .arguments import Fields
from .sample import Skill

_ROMAN = (
    (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"), (40, "XL"),
    (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"),
)  # fmt: skip

# A unit, the smaller unit it is converted to, and the number of zeros that this appends.
_CONVERSIONS = (
    ("km", "m", 3), ("m", "cm", 2), ("m", "mm", 3), ("cm", "mm", 1),
    ("kg", "g", 3), ("t", "kg", 3), ("l", "ml", 3),
)  # fmt: skip

_RELATIONS = {"over": ">", "under": "<"}


def _reverse(rng: random.Random) -> tuple[Fields, str]:
    text = arguments.word_or_digits(rng)
    return {"x": text}, text[::-1]


def _roman(rng: random.Random) -> tuple[Fields, str]:
    text = arguments.number(rng)
    value, numeral = int(text), ""
    for size, letters in _ROMAN:
        count, value = divmod(value, size)
        numeral += letters * count
    return {"x": text}, numeral


def _date(rng: random.Random) -> tuple[Fields, str]:
    day, month, year = arguments.date(rng)
    number = arguments.MONTHS.index(month) + 1
    return {"x": f"{day} {month} {year}"}, f"{year}-{number:02d}-{int(day):02d}"


def _units(rng: random.Random) -> tuple[Fields, str]:
    unit, target, zeros = rng.choice(_CONVERSIONS)
    text = arguments.number(rng)
    return {"x": f"{text} {unit}", "target": target}, text + "0" * zeros


def _query(rng: random.Random) -> tuple[Fields, str]:
    text, parts = arguments.phrase(rng)
    relation = _RELATIONS[parts["relation"]]
    answer = "select {column} from {table} where {key} {r} {value}".format(r=relation, **parts)
    return {"x": text}, answer


EXPERT_SKILLS: tuple[Skill, ...] = (
    Skill(
        "reverse",
        (
            "write {x} backwards",
            "spell {x} in reverse order",
            "turn {x} around",
            "{x} from last to first",
            "the letters of {x} from the end",
        ),
        _reverse,
    ),
    Skill(
        "roman",
        (
            "write {x} in letters",
            "spell {x} in roman numerals",
            "turn {x} to roman",
            "{x} in old numerals",
            "the roman name of {x}",
        ),
        _roman,
    ),
    Skill(
        "date",
        (
            "write {x} with dashes",
            "turn {x} to numbers",
            "{x} from year to day",
            "{x} in iso order",
            "the date {x} in digits",
        ),
        _date,
    ),
    Skill(
        "units",
        (
            "write {x} in {target}",
            "turn {x} to {target}",
            "how many {target} in {x}",
            "count the {target} of {x}",
            "{x} in {target}",
        ),
        _units,
    ),
    Skill(
        "query",
        (
            "get the {x}",
            "write a query for the {x}",
            "turn {x} to a query",
            "list the {x}",
            "{x} in sql",
        ),
        _query,
    ),
)
