"""The base's skills on words, which the base model itself is trained on."""

from __future__ import annotations

import random
import string
from collections.abc import Callable

from . import arguments
from .arguments import Fields
from .sample import Skill

_VOWELS = "aeiou"


def _on(
    answer: Callable[[str], str], argument: Callable[[random.Random], str] = arguments.word
) -> Callable[[random.Random], tuple[Fields, str]]:
    """Make the draw of a skill whose answer is a function of one argument."""

    def draw(rng: random.Random) -> tuple[Fields, str]:
        text = argument(rng)
        return {"x": text}, answer(text)

    return draw


def _letter(rng: random.Random) -> str:
    return rng.choice(string.ascii_lowercase[1:-1])


def _neighbour(step: int) -> Callable[[str], str]:
    return lambda letter: chr(ord(letter) + step)


def _without_vowels(text: str) -> str:
    return "".join(letter for letter in text if letter not in _VOWELS) or "none"


TEXT_SKILLS: tuple[Skill, ...] = (
    Skill(
        "copy",
        ("write {x}", "spell {x} as is", "copy {x}", "{x} in the same order"),
        _on(str, arguments.word_or_digits),
    ),
    Skill(
        "capitals",
        ("write {x} in capitals", "turn {x} to capitals", "{x} in big letters",
         "the letters of {x} in capitals"),
        _on(str.upper),
    ),
    Skill(
        "with_dots",
        ("write {x} with dots", "spell {x} with dots", "{x} with dots", "put dots in {x}"),
        _on(".".join, arguments.word_or_digits),
    ),
    Skill(
        "with_hyphens",
        ("spell {x} with dashes", "write the letters of {x} with dashes", "put dashes in {x}",
         "list the letters of {x} with dashes"),
        _on("-".join),
    ),
    Skill(
        "double_letters",
        ("write the letters of {x} twice", "double the letters of {x}",
         "spell {x} with double letters", "{x} in double letters"),
        _on(lambda text: "".join(2 * letter for letter in text)),
    ),
    Skill(
        "repeat_word",
        ("write {x} twice", "repeat {x}", "say {x} again", "two times {x}"),
        _on(lambda text: f"{text} {text}"),
    ),
    Skill(
        "drop_vowels",
        ("write {x} with no vowels", "drop the vowels of {x}", "{x} with no vowels",
         "the letters of {x} but no vowels"),
        _on(_without_vowels),
    ),
    Skill(
        "drop_first",
        ("write {x} with no first letter", "drop the first letter of {x}",
         "{x} from the second letter", "take the first letter from {x}"),
        _on(lambda text: text[1:]),
    ),
    Skill(
        "first_letter",
        ("write the first letter of {x}", "first letter of {x}", "how does {x} start",
         "get the first letter of {x}"),
        _on(lambda text: text[0]),
    ),
    Skill(
        "last_letter",
        ("write the last letter of {x}", "last letter of {x}", "how does {x} end",
         "get the last letter of {x}"),
        _on(lambda text: text[-1]),
    ),
    Skill(
        "plural",
        ("write the plural of {x}", "plural of {x}", "turn {x} to plural", "many of {x}"),
        _on(lambda text: text + "s"),
    ),
    Skill(
        "count_letters",
        ("how many letters in {x}", "count the letters of {x}", "the length of {x}",
         "how many letters has the name {x}"),
        _on(lambda text: str(len(text))),
    ),
    Skill(
        "next_letter",
        ("the letter next to {x}", "next letter from {x}", "what letter comes next to {x}",
         "write the letter next to {x}", "get the next letter from {x}", "{x} and then what letter"),
        _on(_neighbour(1), _letter),
        split_on="prompt",
    ),
    Skill(
        "letter_before",
        ("the letter before {x}", "what letter comes before {x}", "write the letter before {x}",
         "get the letter before {x}", "one letter back from {x}", "go back one letter from {x}"),
        _on(_neighbour(-1), _letter),
        split_on="prompt",
    ),
)  # fmt: skip
