"""Editing a mixture in its folder: the base is made without memory, and the edit is the one in memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

from peft import PeftModel

from ..errors import PeftMoeError
from ..io.atomic import check_new_folder, new_folder
from ..io.checkpoint import Checkpoint
from ..tuner.config.mixture import MoLoraConfig
from .mixture import Edited


def edit_saved(
    mixture: str | os.PathLike[str],
    out: str | os.PathLike[str],
    edit: Callable[[PeftModel], Edited],
    *,
    base: str | None = None,
    overwrite: bool = False,
) -> Edited:
    """Load a saved mixture without its base's weights, edit it, and save it elsewhere.

    Args:
        mixture: folder of the mixture; it stays as it is.
        out: folder to write; it appears whole or not at all.
        edit: one of this package's functions, called with the PeftModel. None that runs texts through the
            base can be: there are no weights to run them through.
        base: folder or Hub id of the base; default: what the mixture's config names.
        overwrite: replace ``out`` where it is a folder already.

    Raises:
        PeftMoeError: a folder or an edit that cannot be; nothing has been written then.
    """
    place = check_new_folder(out, [mixture], overwrite=overwrite)
    config = MoLoraConfig.from_pretrained(os.fspath(mixture))
    if not isinstance(config, MoLoraConfig):
        raise PeftMoeError(
            f"{mixture} holds a {config.peft_type} adapter, no mixture; name a mixture's folder"
        )
    named = base or config.base_model_name_or_path
    if not named:
        raise PeftMoeError(f"{mixture} does not name its base; give its folder or Hub id as `base`")
    empty = Checkpoint.open(named).empty_model()
    with warnings.catch_warnings():
        # The mixture may have been made on a quantised base; here nothing is computed on it.
        warnings.filterwarnings("ignore", message="this mixture was made on a base")
        model = PeftModel.from_pretrained(empty, mixture, low_cpu_mem_usage=True, is_trainable=False)
    done = edit(model)
    # As it was saved: not what the empty base looks like.
    after = model.peft_config[done.adapter]
    after.base_precision = config.base_precision  # type: ignore[attr-defined]
    after.base_model_name_or_path = config.base_model_name_or_path
    with new_folder(place) as folder:
        model.save_pretrained(str(folder))
        _take_along(Path(mixture), folder)
    return done


def _take_along(source: Path, folder: Path) -> None:
    """What lies beside a mixture and does not speak of its experts: the tokenizer's files."""
    for path in source.iterdir():
        if path.is_file() and ("token" in path.name or path.name in ("vocab.json", "merges.txt")):
            (folder / path.name).write_bytes(path.read_bytes())
