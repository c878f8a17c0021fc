"""``peft-moe add-expert`` and its like: a saved mixture is edited into a new folder, without the base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..console import wide_console

Mixture = Annotated[Path, typer.Argument(help="Folder of a saved mixture; it stays as it is.")]
Name = Annotated[str, typer.Argument(help="The expert.")]
Adapter = Annotated[str, typer.Argument(help="Folder or Hub id of a trained LoRA adapter of the same base.")]
Out = Annotated[Path, typer.Option(help="Folder to write.")]
Base = Annotated[str | None, typer.Option(help="Folder or Hub id of the base, if the mixture's is not here.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")]
Mismatch = Annotated[bool, typer.Option(help="Accept an adapter that names another base.")]


def add_expert(
    mixture: Mixture,
    name: Name,
    adapter: Adapter,
    out: Out,
    init: Annotated[
        str | None, typer.Option(help="How its router row starts: mean (of the others) or zero (no mass).")
    ] = None,
    base: Base = None,
    allow_base_mismatch: Mismatch = False,
    overwrite: Overwrite = False,
) -> None:
    """Put one more adapter into a saved mixture.

    Rows from data (centroid, fit, refit) need the base: see peft_moe.editing.add_expert.
    """
    from ... import editing

    def edit(model: Any) -> editing.Edited:
        return editing.add_expert(model, name, adapter, init=init, allow_base_mismatch=allow_base_mismatch)

    _edit(mixture, out, edit, base, overwrite)


def replace_expert(
    mixture: Mixture,
    name: Name,
    adapter: Adapter,
    out: Out,
    base: Base = None,
    allow_base_mismatch: Mismatch = False,
    overwrite: Overwrite = False,
) -> None:
    """Put another adapter in an expert's place; it takes over the router row."""
    from ... import editing

    def edit(model: Any) -> editing.Edited:
        return editing.replace_expert(model, name, adapter, allow_base_mismatch=allow_base_mismatch)

    _edit(mixture, out, edit, base, overwrite)


def remove_expert(
    mixture: Mixture, name: Name, out: Out, base: Base = None, overwrite: Overwrite = False
) -> None:
    """Take an expert out of a saved mixture, and its router row."""
    from ... import editing

    _edit(mixture, out, lambda model: editing.remove_expert(model, name), base, overwrite)


def rename_expert(
    mixture: Mixture,
    name: Name,
    new_name: Annotated[str, typer.Argument(help="What it is called from now on.")],
    out: Out,
    base: Base = None,
    overwrite: Overwrite = False,
) -> None:
    """Call an expert of a saved mixture something else."""
    from ... import editing

    _edit(mixture, out, lambda model: editing.rename_expert(model, name, new_name), base, overwrite)


def reorder_experts(
    mixture: Mixture,
    names: Annotated[list[str], typer.Argument(help="Each expert once, in the order wanted.")],
    out: Out,
    base: Base = None,
    overwrite: Overwrite = False,
) -> None:
    """Put the experts of a saved mixture into another order."""
    from ... import editing

    _edit(mixture, out, lambda model: editing.reorder_experts(model, names), base, overwrite)


def _edit(mixture: Path, out: Path, edit: Callable[[Any], Any], base: str | None, overwrite: bool) -> None:
    from ...editing.on_disk import edit_saved

    done = edit_saved(mixture, out, edit, base=base, overwrite=overwrite)
    console = wide_console()
    console.print(f"Kept: {out}. Its experts: {', '.join(done.experts)}", highlight=False)
    for word, modules in (("now adapts", done.injected), ("no longer adapts", done.dropped)):
        if modules:
            console.print(f"It {word} {len(modules)} modules, such as {modules[0]}", highlight=False)
