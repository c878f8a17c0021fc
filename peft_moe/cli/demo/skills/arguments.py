"""The arguments of questions. Base skills and expert skills draw them from the same functions.

If a skill had its own kind of arguments, their form alone would tell a router the skill.
"""

from __future__ import annotations

import random

Fields = dict[str, str]
"""The values for a phrasing, by the names of its placeholders."""

WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
MONTHS = (
    "jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec",
)  # fmt: skip

# More than half of these words occur in the phrasings. A question about the word "roman" is not a question
# for the expert of Roman numerals.
WORDS = (
    "roman", "reverse", "letter", "letters", "numerals", "date", "digits", "order", "query",
    "sql", "iso", "table", "back", "names", "write", "spell", "year", "day", "unit", "list",
    "around", "turn", "old", "end", "select", "capitals", "numbers", "month", "first", "last",
    "backwards", "same", "copy", "as", "big", "dots", "double", "vowels", "take", "second",
    "start", "plural", "there", "largest", "smallest", "even", "odd", "or", "four", "ten",
    "digit", "at", "two", "say", "again", "repeat", "dashes", "many",
    "banana", "river", "window", "stone", "apple", "garden", "yellow", "music", "paper", "cloud",
    "tiger", "lemon", "silver", "market", "bridge", "candle", "forest", "pepper", "rocket",
    "orange", "planet", "winter", "island", "copper", "monkey", "pencil", "basket", "thunder",
)  # fmt: skip

TABLES = ("users", "orders", "books", "shops", "pets", "cars", "teams", "songs")
COLUMNS = ("name", "age", "price", "city", "size", "stock", "color", "rank", "owner", "weight")
UNITS = ("km", "m", "cm", "mm", "kg", "g", "t", "l", "ml")

_CONSONANTS, _VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"


def word(rng: random.Random) -> str:
    """Draw a word of `WORDS`, or in two of three draws three to five random letters."""
    if rng.random() < 0.33:
        return rng.choice(WORDS)
    letters = (rng.choice(_VOWELS if rng.random() < 0.4 else _CONSONANTS) for _ in range(5))
    return "".join(letters)[: rng.randint(3, 5)]


def number(rng: random.Random) -> str:
    """Draw a number from 1 to 999, small ones more often."""
    return str(rng.randint(1, rng.choice((99, 999, 999))))


def digits(rng: random.Random) -> str:
    """Draw three or four random digits."""
    return "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 4)))


def word_or_digits(rng: random.Random) -> str:
    """Draw a word, or in one of three draws a string of digits."""
    return digits(rng) if rng.random() < 0.33 else word(rng)


def date(rng: random.Random) -> tuple[str, str, str]:
    """Draw day, month's name and year of a date. The day is 1 to 28, so that every date exists."""
    return str(rng.randint(1, 28)), rng.choice(MONTHS), str(rng.randint(1900, 2099))


def quantity(rng: random.Random) -> tuple[str, str]:
    """Draw a number and a unit."""
    return number(rng), rng.choice(UNITS)


def condition(rng: random.Random) -> Fields:
    """Draw the parts of a phrase such as ``name of users with age over 30``."""
    column, key = rng.sample(COLUMNS, 2)
    return {
        "column": column,
        "table": rng.choice(TABLES),
        "key": key,
        "relation": rng.choice(("over", "under")),
        "value": number(rng),
    }


def phrase(rng: random.Random) -> tuple[str, Fields]:
    """Draw a `condition`, and return it in words and in parts."""
    parts = condition(rng)
    return "{column} of {table} with {key} {relation} {value}".format(**parts), parts
