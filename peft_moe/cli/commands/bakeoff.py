"""``peft-moe bakeoff``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bakeoff(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file with base, experts, domains and budgets.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for scores and results.")] = Path("runs/bakeoff"),
    only: Annotated[
        str, typer.Option(help="Patterns of the methods to run, such as 'uniform,context*'. Default: all.")
    ] = "",
    skip: Annotated[str, typer.Option(help="Patterns of the methods to leave out.")] = "",
    methods_file: Annotated[
        Path | None,
        typer.Option(help="YAML file of methods that extend or replace the built-in ones."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Override a key, such as train.steps=50. Repeatable.",
        ),
    ] = None,
) -> None:
    """Compare mixtures, merges and PEFT's own methods on the same experts, texts, steps and seeds.

    Scores that exist under the same settings are reused. To continue an interrupted run, or to add methods
    later, run the same command again.
    """
    from ...evaluation.bakeoff.run import run_bakeoff
    from ...evaluation.bakeoff.settings_file import read_settings

    results = run_bakeoff(
        read_settings(config, settings or []),
        out,
        only=_split(only),
        skip=_split(skip),
        methods_file=methods_file,
    )
    if results["failed"]:
        raise typer.Exit(code=1)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
