"""Every fault of the list is a case here, or names tests that exist."""

from __future__ import annotations

import dataclasses
import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from faults import test_adapters, test_saved_mixtures
from faults.harness import Row
from faults.registry import FAULTS, NAMED
from peft_moe import MoLoraConfig

TESTS = Path(__file__).parents[1]
ROWS: list[Row] = [
    *test_adapters.FIELD_ROWS,
    *test_adapters.BASE_ROWS,
    *test_saved_mixtures.CONFIG_ROWS,
    *test_saved_mixtures.FIELD_ROWS,
    *test_saved_mixtures.RECORD_ROWS,
    *test_saved_mixtures.WEIGHT_ROWS,
]


@cache
def module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("named_" + path.replace("/", "_")[:-3], TESTS / path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def cases(test: Any) -> list[str]:
    """The ids that pytest makes of texts in the table of a test."""
    marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    values = [value for mark in marks for value in (mark.kwargs.get("ids") or mark.args[1])]
    return [value[0] if isinstance(value, tuple) else value for value in values]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_tested(fault: str) -> None:
    assert fault in NAMED or fault in {row.fault for row in ROWS}
    for node in NAMED.get(fault, []):
        path, _, rest = node.partition("::")
        name, _, case = rest.partition("[")
        test = getattr(module(path), name)
        if case:
            assert case.removesuffix("]") in cases(test), node


def test_nothing_else_is_listed() -> None:
    assert set(NAMED) <= set(FAULTS)
    assert {row.fault for row in ROWS} <= set(FAULTS)


def test_there_are_many() -> None:
    """What a release promises: at least 150 cases, each with its id."""
    assert len({row.id for row in ROWS}) >= 150


def test_the_page_speaks_of_every_fault() -> None:
    page = (TESTS / "faults" / "README.md").read_text()
    assert [fault for fault in FAULTS if f"\n| {fault} |" not in page] == []


def test_a_config_asks_for_nothing_that_the_base_says() -> None:
    """B16: sizes come from the base's layers, and cannot be given wrongly."""
    names = {field.name for field in dataclasses.fields(MoLoraConfig)}
    assert not names & {
        "hidden_size",
        "in_features",
        "out_features",
        "num_layers",
        "vocab_size",
        "fan_in_fan_out",
    }


def test_documents_say_what_to_import_first() -> None:
    """B17: without the import PEFT knows no "MOLORA", and can only say KeyError."""
    assert "import peft_moe" in (TESTS.parent / "README.md").read_text()
