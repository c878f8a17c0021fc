"""``peft-moe inspect``."""

from __future__ import annotations

from typing import Annotated

import typer

from ..console import print_json, wide_console


def inspect(
    paths: Annotated[
        list[str],
        typer.Argument(help="Adapters, full models or saved mixtures (folders or Hub ids), or mix files."),
    ],
    base: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the base to compare them with.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Report ranks, targets, sizes, memory and problems from configs and headers, without loading weights.

    Exits with code 2 if peft-moe would refuse one of them.
    """
    from ...mixfile.inspect import inspect_paths
    from ...mixfile.inspection_report import as_table

    inspections = inspect_paths(paths, base)
    if as_json:
        print_json([inspection.to_dict() for inspection in inspections])
    else:
        wide_console().print(as_table(inspections))
    if any(inspection.all_problems for inspection in inspections):
        raise typer.Exit(code=2)
