"""The list of commands: each one explains itself, and a refusal is a message."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from peft_moe.cli.main import PANELS, app

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def test_every_command_stands_under_one_heading() -> None:
    names = [function.__name__.replace("_", "-") for functions in PANELS.values() for function in functions]
    assert sorted(names) == sorted(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_and_each_of_its_options_explain_themselves(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0
    assert COMMANDS[name].help
    assert [param.name for param in COMMANDS[name].params if not param.help] == []


def test_a_refusal_is_a_message_with_exit_code_2() -> None:
    command = [
        sys.executable,
        "-c",
        "from peft_moe.cli.main import run; run()",
        "inspect",
        "no/such/folder/here",
    ]
    done = subprocess.run(
        [*command, "--base", "nor/this/one"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
