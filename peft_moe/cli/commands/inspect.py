"""``peft-moe inspect``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..console import wide_console


def inspect(
    paths: Annotated[
        list[str],
        typer.Argument(help="Adapters, full models, saved mixtures (folders or Hub ids), mix files."),
    ],
    base: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the base that they are held against.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what will happen, from configs and headers: ranks, targets, sizes, memory, problems.

    Ends with code 2 if something would be refused.
    """
    from ...mixfile.inspect import inspect_paths
    from ...mixfile.inspection_report import as_table

    found = inspect_paths(paths, base)
    if as_json:
        typer.echo(json.dumps([one.to_dict() for one in found], indent=1))
    else:
        wide_console().print(as_table(found))
    if any(one.all_problems for one in found):
        raise typer.Exit(code=2)
