"""The catalogue is read from the code, and the page of it is kept in step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peft_moe import Scorer, register_router
from peft_moe.cli.commands.routers import as_markdown, catalogue
from peft_moe.cli.main import app
from peft_moe.routers import PRESETS, available_scorers

PAGE = Path(__file__).parents[2] / "ROUTERS.md"


def test_every_preset_and_every_scorer_is_listed_once():
    names = [row.name for row in catalogue()]
    assert len(names) == len(set(names))
    assert set(names) == {*PRESETS, *available_scorers()}


def test_rows_tell_what_the_code_does():
    rows = {row.name: row for row in catalogue()}
    assert rows["uniform"].mergeable
    assert not rows["uniform"].trains
    assert rows["lorahub"].mergeable
    assert rows["lorahub"].scope == "model"
    assert rows["mixtral"].selection == "softmax top-2"
    assert rows["mixtral"].trains
    assert rows["context"].fit == "logistic"
    assert rows["context"].granularity == "prompt"
    assert "prefill only" in rows["xlora"].cost


def test_a_router_of_ones_own_appears():
    class Mine(Scorer):
        """Scores of my own."""

    register_router("mine_alone")(Mine)
    assert next(r for r in catalogue() if r.name == "mine_alone").summary == "Scores of my own."


def test_the_page_has_the_catalogue_of_today():
    assert as_markdown(catalogue()) in PAGE.read_text(encoding="utf-8"), (
        "ROUTERS.md is stale: paste what `peft-moe routers --markdown` prints"
    )


@pytest.mark.parametrize("option", [[], ["--json"], ["--markdown"]])
def test_command(option):
    result = CliRunner().invoke(app, ["routers", *option])
    assert result.exit_code == 0
    for row in catalogue():
        assert row.name in result.output
    if option == ["--json"]:
        assert [r["name"] for r in json.loads(result.output)] == [row.name for row in catalogue()]
