"""``peft-moe bakeoff``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bakeoff(
    config: Annotated[Path | None, typer.Argument(help="YAML with base, experts, domains, budgets.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for scores and results.")] = Path("runs/bakeoff"),
    only: Annotated[str, typer.Option(help="Methods to run, as 'uniform,context*'. Default: all.")] = "",
    skip: Annotated[str, typer.Option(help="Methods not to run, likewise.")] = "",
    methods_file: Annotated[
        Path | None, typer.Option(help="YAML of methods, laid over the table that comes with the package.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Over the file, as train.steps=50. Repeatable."),
    ] = None,
) -> None:
    """Compare mixtures, merges and PEFT's own methods on the same experts, texts, steps and seeds.

    What has been scored under the same settings is not scored again: start an interrupted run again with
    the same command, or add methods later.
    """
    from ..evaluation.bakeoff.run import run_bakeoff
    from ..evaluation.bakeoff.settings_file import read_settings

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
