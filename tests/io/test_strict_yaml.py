"""YAML is read in one way only, or refused with the line."""

from __future__ import annotations

import pytest

from peft_moe import PeftMoeError
from peft_moe.io.strict_yaml import read_yaml


def read(text, tmp_path):
    (tmp_path / "mix.yaml").write_text(text)
    return read_yaml(tmp_path / "mix.yaml")


def test_values(tmp_path):
    text = "a: 1e-4\nb: 1.5\nc: -3\nd: true\ne: ~\nf:\ng: some text\nh: 'no'\ni: 0\nl: .5\n"
    text += "m: [p, q]\nday: 2001-01-01"
    assert read(text, tmp_path) == {
        "a": 1e-4, "b": 1.5, "c": -3, "d": True, "e": None, "f": None, "g": "some text", "h": "no", "i": 0,
        "l": 0.5, "m": ["p", "q"], "day": "2001-01-01",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", r"line 3: the key 'a' appears twice, first in line 1"),
        ("a:\n  x: 1\n  x: 2", r"line 3: the key 'x' appears twice"),
        ("no: 1", r"line 1: 'no' is text to some readers"),
        ("a: on", r"'on' is text to some readers"),
        ("a: [b, Yes]", r"'Yes' is text to some readers"),
        ("a: 1_0", r"'1_0' is text to some"),
        ("a: 12:30", r"'12:30' is text to some"),
        ("a: 010", r"'010' is text to some"),
        ("a: 0x1F", r"'0x1F' is text to some"),
        ("1: a", r"the key '1' is no text; quote it"),
        ("true: a", r"the key 'true' is no text"),
        ("? [a]\n: b", r"a key must be text"),
        ("<<: {a: 1}", r"the key '<<' is no text"),
        ("a: !!python/object/apply:os.system [ls]", r"could not determine a constructor"),
        ("a: [1", r"line 1: not plain YAML"),
        ("a: 1\n---\nb: 2", r"another document"),
        ("- a", r"holds a list, not keys and values"),
        ("", r"holds a NoneType"),
        ("a: 08", r"not plain YAML"),
    ],
)
def test_refusals(text, message, tmp_path):
    with pytest.raises(PeftMoeError, match=message) as caught:
        read(text, tmp_path)
    assert "mix.yaml" in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(PeftMoeError, match="cannot be read"):
        read_yaml(tmp_path / "mix.yaml")
