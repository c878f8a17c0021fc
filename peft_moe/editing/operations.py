"""Adding, removing, replacing, renaming and reordering experts of a model in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..experts.adapter import open_experts, warn_of_twins
from ..experts.checks import check_expert_names, check_one_base
from ..fitting import fit_router
from .apply import Editor
from .fit_new_column import row_fit
from .mixture import Edited
from .optimizer import follow_edit
from .plan import Edit, index_of, ordering, removal, renaming
from .router_columns import check_init

Data = Iterable[Mapping[str, Any]]
LATER = ("centroid", "fit", "refit")
"""Rows that are set once the expert is there."""


def add_expert(
    model: nn.Module,
    name: str,
    source: str | os.PathLike[str],
    *,
    init: str | None = None,
    data: Data | None = None,
    tokenizer: Any = None,
    adapter_name: str | None = None,
    allow_base_mismatch: bool = False,
    optimizer: Any = None,
    batch_size: int = 32,
    progress: bool = True,
) -> Edited:
    """Put a trained adapter behind the experts that are there.

    Modules that only the new expert adapts get a layer of their own; no other expert has ranks in it.

    Args:
        model: a PeftModel with a mixture.
        name: of the expert.
        source: folder or Hub id of a PEFT LoRA adapter, as in ``MoLoraConfig(experts=…)``.
        init: how its router row starts. "mean" of the other experts' rows (the default); "zero": no mass for
            any input, so that nothing changes until the row is set; "centroid": from the new expert's mean
            input; "fit": the row alone by logistic regression, the others as they are; "refit": all rows, by
            :func:`~peft_moe.fitting.fit_router`. Routers without rows, or made from the experts' weights,
            take none of these but, for "arrow", "zero".
        data, tokenizer: for the last three: samples with a ``domain``, as for ``fit_router``; those of other
            domains tell the new expert from the rest.
        adapter_name: which mixture; default: the active one.
        allow_base_mismatch: accept an adapter that names another base.
        optimizer: goes on with the edited model, see :func:`follow_edit`.
        batch_size: texts per pass.
        progress: whether to show bars.

    Raises:
        PeftMoeError: whatever makes an adapter unfit, a taken name, an ``init`` that this router cannot take.
            The model is as it was.
    """
    editor = Editor(model, adapter_name)
    old = (*range(editor.config.num_experts), None)
    texts = (data, tokenizer, batch_size, progress)
    return _take_in(editor, model, name, source, old, None, init, texts, allow_base_mismatch, optimizer)


def replace_expert(
    model: nn.Module,
    name: str,
    source: str | os.PathLike[str],
    *,
    init: str | None = None,
    data: Data | None = None,
    tokenizer: Any = None,
    adapter_name: str | None = None,
    allow_base_mismatch: bool = False,
    optimizer: Any = None,
    batch_size: int = 32,
    progress: bool = True,
) -> Edited:
    """Put another adapter in an expert's place, under its name.

    Args:
        init: default: the new expert takes over the old one's router row; else as in :func:`add_expert`, like
            all other arguments.

    Raises:
        PeftMoeError: as in :func:`add_expert`, or there is no such expert.
    """
    editor = Editor(model, adapter_name)
    place = index_of(name, editor.config, editor.adapter)
    old = tuple(None if p == place else p for p in range(editor.config.num_experts))
    rows: tuple[int, ...] | None = tuple(range(editor.config.num_experts))
    if init is not None or editor.router.scorer.reads_experts:
        rows = None
    texts = (data, tokenizer, batch_size, progress)
    return _take_in(editor, model, name, source, old, rows, init, texts, allow_base_mismatch, optimizer)


def _take_in(
    editor: Editor,
    model: nn.Module,
    name: str,
    source: str | os.PathLike[str],
    old: tuple[int | None, ...],
    rows: tuple[int | None, ...] | None,
    init: str | None,
    texts: tuple[Data | None, Any, int, bool],
    allow_base_mismatch: bool,
    optimizer: Any,
) -> Edited:
    config, router, (data, tokenizer, batch_size, progress) = editor.config, editor.router, texts
    specs = config.specs()
    others = [spec for place, spec in enumerate(specs) if place in old]
    check_expert_names([*(spec.name for spec in others), name], editor.inner)
    how = check_init(init, router.settings, router, config.router) if rows is None else "own"
    file = open_experts({name: source}, editor.inner, allow_base_mismatch=allow_base_mismatch)[0]
    try:
        if not allow_base_mismatch:
            check_one_base({s.name: {"base_model_name_or_path": s.base_model} for s in (*others, file.spec)})
        warn_of_twins([*others, file.spec])
        edit = Edit(old, tuple(file.spec if o is None else specs[o] for o in old), rows)
        edit, new_config, wanted = editor.plan(edit, file)
        kept = list(data) if data is not None else None
        said = {"batch_size": batch_size, "progress": progress}
        fit = row_fit(how, name, new_config, router, kept, tokenizer, **said)  # type: ignore[arg-type]
        done = editor.carry_out(edit, new_config, wanted, file, "mean" if how in LATER else how)
    finally:
        file.close()
    try:
        if fit is not None:
            fit.run(editor)
        if how == "refit":
            fit_router(model, kept or (), tokenizer, adapter_name=editor.adapter, **said)  # type: ignore[arg-type]
    except Exception:
        if len(old) > len(specs):  # taking it out again leaves nothing behind
            remove_expert(model, name, adapter_name=editor.adapter)
        raise
    return _follow(optimizer, model, done)


def remove_expert(
    model: nn.Module, name: str, *, adapter_name: str | None = None, optimizer: Any = None
) -> Edited:
    """Take an expert out, and its router row; layers that only it adapted become the base's again.

    The weights of the others are renormalised by the router as if it had never been there.

    Raises:
        PeftMoeError: no such expert, the last one, or a routing that cannot be without it (a shared expert's
            last partner, a straight-through choice among one).
    """
    editor = Editor(model, adapter_name)
    edit, config, _ = editor.plan(removal(editor.config, name, editor.adapter), None)
    return _follow(optimizer, model, editor.carry_out(edit, config, [], None, "own"))


def rename_expert(model: nn.Module, name: str, new_name: str, *, adapter_name: str | None = None) -> Edited:
    """Call an expert something else; nothing moves.

    Raises:
        PeftMoeError: no such expert, or the new name is taken or not allowed.
    """
    editor = Editor(model, adapter_name)
    edit = renaming(editor.config, name, new_name, editor.adapter)
    check_expert_names(edit.names, editor.inner)
    edit, config, _ = editor.plan(edit, None)
    return editor.carry_out(edit, config, [], None, "own")


def reorder_experts(
    model: nn.Module, names: Sequence[str], *, adapter_name: str | None = None, optimizer: Any = None
) -> Edited:
    """Put the experts, and the router's columns, into another order.

    Args:
        names: each expert once, in the order wanted.

    Raises:
        PeftMoeError: a name is missing, unknown or given twice.
    """
    editor = Editor(model, adapter_name)
    edit, config, _ = editor.plan(ordering(editor.config, names, editor.adapter), None)
    return _follow(optimizer, model, editor.carry_out(edit, config, [], None, "own"))


def _follow(optimizer: Any, model: nn.Module, done: Edited) -> Edited:
    if optimizer is not None:
        follow_edit(optimizer, model, done)
    return done
