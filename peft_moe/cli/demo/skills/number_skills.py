"""The base's skills on numbers, dates, quantities and phrases, which are also the experts' arguments."""

from __future__ import annotations

import random
from collections.abc import Callable

from . import arguments
from .arguments import Fields
from .sample import Skill

Draw = Callable[[random.Random], tuple[Fields, str]]


def _three(pick: Callable[[list[int]], int]) -> Draw:
    def draw(rng: random.Random) -> tuple[Fields, str]:
        values = rng.sample(range(10), 3)
        return {"x": " ".join(map(str, values))}, str(pick(values))

    return draw


def _number(answer: Callable[[str], str], argument: Callable[[random.Random], str]) -> Draw:
    def draw(rng: random.Random) -> tuple[Fields, str]:
        text = argument(rng)
        return {"x": text}, answer(text)

    return draw


def _next_of(names: tuple[str, ...], step: int) -> Draw:
    def draw(rng: random.Random) -> tuple[Fields, str]:
        index = rng.randrange(len(names))
        return {"x": names[index]}, names[(index + step) % len(names)]

    return draw


def _date_part(part: int) -> Draw:
    def draw(rng: random.Random) -> tuple[Fields, str]:
        parts = arguments.date(rng)
        return {"x": " ".join(parts)}, parts[part]

    return draw


def _quantity_part(part: int) -> Draw:
    def draw(rng: random.Random) -> tuple[Fields, str]:
        parts = arguments.quantity(rng)
        return {"x": " ".join(parts)}, parts[part]

    return draw


def _phrase_part(part: str) -> Draw:
    def draw(rng: random.Random) -> tuple[Fields, str]:
        text, parts = arguments.phrase(rng)
        return {"x": text}, parts[part]

    return draw


NUMBER_SKILLS: tuple[Skill, ...] = (
    Skill(
        "largest",
        ("the largest of {x}", "write the largest of {x}", "get the largest number of {x}",
         "what number of {x} is the largest"),
        _three(max),
    ),
    Skill(
        "smallest",
        ("the smallest of {x}", "write the smallest of {x}", "get the smallest number of {x}",
         "what number of {x} is the smallest"),
        _three(min),
    ),
    Skill(
        "even_odd",
        ("is {x} even or odd", "{x} is even or odd", "even or odd is the number {x}",
         "turn {x} to even or odd"),
        _number(lambda text: "odd" if int(text) % 2 else "even", arguments.number),
    ),
    Skill(
        "pad_zeros",
        ("write {x} with four digits", "turn {x} to four digits", "{x} in four digits",
         "spell {x} in four digits"),
        _number(lambda text: text.zfill(4), arguments.number),
    ),
    Skill(
        "times_ten",
        ("ten times {x}", "how many in ten times {x}", "{x} times ten", "write {x} times ten"),
        _number(lambda text: text + "0", arguments.number),
    ),
    Skill(
        "count_digits",
        ("how many digits in {x}", "count the digits of {x}", "the length of the number {x}",
         "how many digits has {x}"),
        _number(lambda text: str(len(text)), arguments.digits),
    ),
    Skill(
        "last_digit",
        ("write the last digit of {x}", "last digit of {x}", "get the last digit of {x}",
         "the digit {x} has at the end"),
        _number(lambda text: text[-1], arguments.digits),
    ),
    Skill(
        "month_of",
        ("the month of {x}", "month of the date {x}", "get the month of {x}",
         "write the month of {x}"),
        _date_part(1),
    ),
    Skill(
        "day_of",
        ("the day of {x}", "day of the date {x}", "get the day of {x}", "write the day of {x}"),
        _date_part(0),
    ),
    Skill(
        "year_of",
        ("the year of {x}", "year of the date {x}", "get the year of {x}",
         "write the year of {x}"),
        _date_part(2),
    ),
    Skill(
        "amount_of",
        ("the number of {x}", "write the number of {x}", "{x} but no unit",
         "turn {x} to a number"),
        _quantity_part(0),
    ),
    Skill(
        "unit_of",
        ("the unit of {x}", "write the unit of {x}", "get the unit of {x}", "list the unit in {x}"),
        _quantity_part(1),
    ),
    Skill(
        "table_of",
        ("get the table of the {x}", "what table has the {x}", "write the table for the {x}",
         "list the table of {x}"),
        _phrase_part("table"),
    ),
    Skill(
        "value_of",
        ("get the number of the {x}", "what number has the {x}", "write the number for the {x}",
         "list the number in {x}"),
        _phrase_part("value"),
    ),
    Skill(
        "column_of",
        ("get the first name of the {x}", "what is first in the {x}",
         "write the first name for the {x}", "list what is first in {x}"),
        _phrase_part("column"),
    ),
    Skill(
        "day_after",
        ("the day next to {x}", "what day comes next to {x}", "write the day next to {x}",
         "get the next day from {x}", "{x} and then what day", "next day from {x}"),
        _next_of(arguments.WEEKDAYS, 1),
        split_on="prompt",
    ),
    Skill(
        "day_before",
        ("the day before {x}", "what day comes before {x}", "write the day before {x}",
         "get the day before {x}", "one day back from {x}", "go back one day from {x}"),
        _next_of(arguments.WEEKDAYS, -1),
        split_on="prompt",
    ),
    Skill(
        "month_after",
        ("the month next to {x}", "what month comes next to {x}", "write the month next to {x}",
         "get the next month from {x}", "what is the month next to {x}", "next month from {x}"),
        _next_of(arguments.MONTHS, 1),
        split_on="prompt",
    ),
)  # fmt: skip
