"""The commands that edit a saved mixture into a new folder, without loading its base.

They are ``peft-moe add-expert``, ``remove-expert``, ``replace-expert``, ``rename-expert`` and
``reorder-experts``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..console import print_lines

Mixture = Annotated[Path, typer.Argument(help="Folder of a saved mixture; it is not changed.")]
Name = Annotated[str, typer.Argument(help="Name of the expert.")]
Adapter = Annotated[str, typer.Argument(help="Folder or Hub id of a trained LoRA adapter of the same base.")]
Out = Annotated[Path, typer.Option(help="Folder to write the edited mixture to.")]
Base = Annotated[
    str | None,
    typer.Option(help="Folder or Hub id of the base. Default: as in the mixture's config."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")]
Mismatch = Annotated[bool, typer.Option(help="Accept an adapter whose config names another base.")]


def add_expert(
    mixture: Mixture,
    name: Name,
    adapter: Adapter,
    out: Out,
    init: Annotated[
        str | None,
        typer.Option(help="First value of its router row: mean (of the other rows) or zero (no weight)."),
    ] = None,
    base: Base = None,
    allow_base_mismatch: Mismatch = False,
    overwrite: Overwrite = False,
) -> None:
    """Add an adapter to a saved mixture as a new expert.

    Router rows computed from data (centroid, fit, refit) need the base: see peft_moe.editing.add_expert.
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
    """Replace an expert by another adapter, which keeps the expert's router row."""
    from ... import editing

    def edit(model: Any) -> editing.Edited:
        return editing.replace_expert(model, name, adapter, allow_base_mismatch=allow_base_mismatch)

    _edit(mixture, out, edit, base, overwrite)


def remove_expert(
    mixture: Mixture, name: Name, out: Out, base: Base = None, overwrite: Overwrite = False
) -> None:
    """Remove an expert and its router row from a saved mixture."""
    from ... import editing

    _edit(mixture, out, lambda model: editing.remove_expert(model, name), base, overwrite)


def rename_expert(
    mixture: Mixture,
    name: Name,
    new_name: Annotated[str, typer.Argument(help="New name of the expert.")],
    out: Out,
    base: Base = None,
    overwrite: Overwrite = False,
) -> None:
    """Rename an expert of a saved mixture."""
    from ... import editing

    _edit(mixture, out, lambda model: editing.rename_expert(model, name, new_name), base, overwrite)


def reorder_experts(
    mixture: Mixture,
    names: Annotated[list[str], typer.Argument(help="Every expert once, in the new order.")],
    out: Out,
    base: Base = None,
    overwrite: Overwrite = False,
) -> None:
    """Change the order of the experts of a saved mixture."""
    from ... import editing

    _edit(mixture, out, lambda model: editing.reorder_experts(model, names), base, overwrite)


def _edit(mixture: Path, out: Path, edit: Callable[[Any], Any], base: str | None, overwrite: bool) -> None:
    from ...editing.on_disk import edit_saved

    done = edit_saved(mixture, out, edit, base=base, overwrite=overwrite)
    print_lines([f"Saved: {out}. Its experts: {', '.join(done.experts)}"])
    for verb, modules in (("now adapts", done.injected), ("no longer adapts", done.dropped)):
        if modules:
            print_lines([f"It {verb} {len(modules)} modules, for example {modules[0]}"])
