"""Output of the commands: tables and lines for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

import typer
from rich.console import Console


def wide_console() -> Console:
    """Return a console that is 160 columns wide where standard output is not a terminal.

    Rich would otherwise squeeze tables into 80 columns there.
    """
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=160)


def print_lines(lines: Iterable[str]) -> None:
    """Print each line as it is, without markup."""
    console = wide_console()
    for line in lines:
        console.print(line, markup=False)


def print_json(data: Any) -> None:
    """Print plain data as JSON."""
    typer.echo(json.dumps(data, indent=1))
