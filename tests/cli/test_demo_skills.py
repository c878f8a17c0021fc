"""The demo's questions: right answers, the same in every process, and no give-away words."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import random
import re
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from peft_moe.cli.demo import BASE_NAME, asset_path
from peft_moe.cli.demo.skills import (
    BASE,
    BASE_SKILLS_HELD_OUT,
    BASE_SKILLS_SEEN,
    EXPERTS,
    MARKER,
    STOP,
    flatten,
    generate,
    label,
    two_skill,
    write_jsonl,
)
from peft_moe.cli.demo.skills.generate import skill
from peft_moe.cli.demo.tokenizer import demo_tokenizer

SKILLS = EXPERTS + BASE_SKILLS_SEEN + BASE_SKILLS_HELD_OUT
COMMON = 0.1  # a word in more than this share of a skill's prompts must not be its own

DAYS = ["mon", "tue", "wed", "thu", "fri", "sat", "sun", "mon"]
MONTHS = [datetime.date(2000, month, 1).strftime("%b").lower() for month in range(1, 13)]
NUMERALS = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500}
TENS = ("", "X", "XX", "XXX", "XL", "L", "LX", "LXX", "LXXX", "XC")
ONES = ("", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX")
HUNDREDS = ("", "C", "CC", "CCC", "CD", "D", "DC", "DCC", "DCCC", "CM")
SMALLEST_UNITS = {
    "km": 10**6, "m": 1000, "cm": 10, "mm": 1, "t": 10**6, "kg": 1000, "g": 1, "l": 1000, "ml": 1,
}  # fmt: skip


def _roman(text: str) -> str:
    value = int(text)
    return HUNDREDS[value // 100] + TENS[value // 10 % 10] + ONES[value % 10]


def _units(text: str, target: str) -> str:
    amount, unit = text.split()
    return str(int(amount) * SMALLEST_UNITS[unit] // SMALLEST_UNITS[target])


def _query(text: str) -> str:
    column, table, key, relation, value = re.fullmatch(
        r"(\w+) of (\w+) with (\w+) (\w+) (\d+)", text
    ).groups()
    sign = {"over": ">", "under": "<"}[relation]
    return f"select {column} from {table} where {key} {sign} {value}"


ANSWERS = {
    "reverse": lambda x: "".join(reversed(x)),
    "roman": _roman,
    "date": lambda x: datetime.datetime.strptime(x, "%d %b %Y").date().isoformat(),
    "units": _units,
    "query": _query,
    "copy": lambda x: x,
    "capitals": lambda x: "".join(chr(ord(letter) - 32) for letter in x),
    "with_dots": lambda x: re.sub(r"(?<=.)(?=.)", ".", x),
    "with_hyphens": lambda x: re.sub(r"(?<=.)(?=.)", "-", x),
    "double_letters": lambda x: re.sub(r"(.)", r"\1\1", x),
    "repeat_word": lambda x: x + " " + x,
    "drop_vowels": lambda x: re.sub("[aeiou]", "", x) or "none",
    "drop_first": lambda x: re.sub("^.", "", x),
    "first_letter": lambda x: re.match(".", x)[0],
    "last_letter": lambda x: re.search(".$", x)[0],
    "plural": lambda x: f"{x}s",
    "count_letters": lambda x: str(sum(1 for _ in x)),
    "next_letter": lambda x: chr(ord(x) + 1),
    "letter_before": lambda x: chr(ord(x) - 1),
    "largest": lambda x: max(x.split(), key=int),
    "smallest": lambda x: min(x.split(), key=int),
    "even_odd": lambda x: "odd" if x[-1] in "13579" else "even",
    "pad_zeros": lambda x: f"{int(x):04d}",
    "times_ten": lambda x: str(int(x) * 10),
    "count_digits": lambda x: str(sum(1 for _ in x)),
    "last_digit": lambda x: str(int(x) % 10),
    "month_of": lambda x: re.search("[a-z]+", x)[0],
    "day_of": lambda x: re.match("[0-9]+", x)[0],
    "year_of": lambda x: re.search("[0-9]+$", x)[0],
    "amount_of": lambda x: re.match("[0-9]+", x)[0],
    "unit_of": lambda x: re.search("[a-z]+", x)[0],
    "table_of": lambda x: re.search(r"of (\w+)", x)[1],
    "value_of": lambda x: re.search(r"\d+$", x)[0],
    "column_of": lambda x: re.match(r"\w+", x)[0],
    "day_after": lambda x: DAYS[DAYS.index(x) + 1],
    "day_before": lambda x: DAYS[DAYS.index(x) - 1] if x != "mon" else "sun",
    "month_after": lambda x: MONTHS[MONTHS.index(x) + 1] if x != "dec" else "jan",
}


@pytest.mark.parametrize("name", SKILLS)
def test_answers_are_right(name: str):
    rng = random.Random(0)
    for _ in range(500):
        fields, answer = skill(name).draw(rng)
        assert ANSWERS[name](*fields.values()) == answer, fields


def test_roman_numerals_read_back():
    for sample in generate("roman", 300, seed=5):
        values = [NUMERALS.get(letter, 1000) for letter in sample.completion.strip()]
        following = [*values[1:], 0]
        pairs = zip(values, following, strict=True)
        total = sum(-value if value < after else value for value, after in pairs)
        assert str(total) in sample.prompt.split()


@pytest.mark.parametrize("name", SKILLS)
def test_samples_are_well_formed(name: str):
    for sample in generate(name, 100, seed=1):
        assert sample.domain == name
        assert sample.prompt.endswith(MARKER)
        assert sample.completion.endswith(STOP)
        assert STOP not in sample.prompt
        assert sample.accepts(sample.completion.strip())
        assert not sample.accepts(sample.completion.strip() + "x")


@pytest.mark.parametrize("name", SKILLS)
def test_train_and_test_share_no_prompt(name: str):
    train = {sample.prompt for sample in generate(name, 2000, seed=2)}
    test = {sample.prompt for sample in generate(name, 500, seed=2, split="test")}
    assert train
    assert test
    assert not train & test


def test_samples_are_the_same_in_every_process():
    code = (
        "import hashlib; from peft_moe.cli.demo.skills import *\n"
        "texts = [s.text for n in EXPERTS + BASE_SKILLS_SEEN for s in generate(n, 20, 3)]\n"
        "texts += [s.text for t in two_skill('date', 'copy', 20, 3) for s in t]\n"
        "print(hashlib.sha256(repr(texts).encode()).hexdigest())"
    )
    texts = [s.text for n in EXPERTS + BASE_SKILLS_SEEN for s in generate(n, 20, 3)]
    texts += [s.text for turns in two_skill("date", "copy", 20, 3) for s in turns]
    expected = hashlib.sha256(repr(texts).encode()).hexdigest()
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        output = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
        assert output.strip() == expected


def test_seeds_and_splits_differ():
    assert generate("reverse", 20, seed=0) != generate("reverse", 20, seed=1)
    assert generate("reverse", 20, seed=0) != generate("reverse", 20, seed=0, split="test")


@pytest.mark.parametrize("name", SKILLS)
def test_every_skill_has_several_phrasings(name: str):
    assert len(set(skill(name).phrasings)) >= 4


def test_no_word_gives_a_skill_away():
    samples = {name: generate(name, 3000, seed=4) for name in SKILLS}
    words = {name: [set(s.prompt.split()) for s in samples[name]] for name in SKILLS}
    for name in SKILLS:
        elsewhere = set().union(*(w for other in SKILLS if other != name for w in words[other]))
        for word in set().union(*words[name]):
            share = sum(word in prompt for prompt in words[name]) / len(words[name])
            assert share <= COMMON or word in elsewhere, f"{word!r} only occurs in {name}"


def test_no_word_gives_an_expert_away():
    """Every common word of an expert's prompts is also in a prompt that the base answers."""
    base = {
        word
        for name in BASE_SKILLS_SEEN + BASE_SKILLS_HELD_OUT
        for sample in generate(name, 3000, seed=4)
        for word in sample.prompt.split()
    }
    for name in EXPERTS:
        prompts = [set(sample.prompt.split()) for sample in generate(name, 1000, seed=4)]
        for word in set().union(*prompts):
            share = sum(word in prompt for prompt in prompts) / len(prompts)
            assert share <= COMMON or word in base, f"{word!r} only occurs in {name}"


def test_groups_and_labels():
    assert len(EXPERTS) >= 4
    assert len(BASE_SKILLS_HELD_OUT) >= 3
    assert len(BASE_SKILLS_SEEN) >= 10
    assert len(set(SKILLS)) == len(SKILLS)
    assert label("roman") == "roman"
    assert label("copy") == label("year_of") == BASE
    with pytest.raises(ValueError, match="reverse"):
        generate("revers", 1, seed=0)


def test_two_skill_texts():
    turns = two_skill("date", "reverse", 10, seed=0)
    assert all([turn.domain for turn in text] == ["date", "reverse"] for text in turns)
    flat = flatten(turns[0])
    assert flat.text == turns[0][0].text + turns[0][1].text
    assert (flat.completion, flat.domain) == (turns[0][1].completion, "reverse")


def test_write_jsonl(tmp_path):
    samples = generate("query", 5, seed=0)
    write_jsonl(tmp_path / "query.jsonl", samples)
    rows = [json.loads(line) for line in (tmp_path / "query.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == [["prompt", "completion", "domain"]] * 5
    assert [row["completion"] for row in rows] == [sample.completion for sample in samples]


def test_tokenizer_round_trip(tmp_path):
    demo_tokenizer().save_pretrained(tmp_path)
    for tokenizer in (demo_tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        assert len(tokenizer) <= 128
        assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3
        printable = "".join(map(chr, range(32, 127)))
        texts = [s.text for name in SKILLS for s in generate(name, 20, seed=0)]
        for text in (*texts, printable, "  two  spaces \n\n and .commas , kept's\n"):
            ids = tokenizer(text).input_ids
            assert len(ids) == len(text)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


def test_assets_are_complete_and_small():
    experts = {folder.name: folder for folder in asset_path("experts").iterdir()}
    assert set(experts) == set(EXPERTS)
    for folder in experts.values():
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == BASE_NAME
    assert len(AutoTokenizer.from_pretrained(asset_path(BASE_NAME))) == len(demo_tokenizer())
    assert sum(path.stat().st_size for path in asset_path(BASE_NAME).parent.rglob("*")) < 11e6
    with pytest.raises(FileNotFoundError, match="build_assets"):
        asset_path("experts/chess")
