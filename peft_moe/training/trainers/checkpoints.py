"""Checkpoints of a training that may be killed at any moment: which are whole, and which is the last of them.

A trainer writes a checkpoint file by file. ``seal`` writes ``COMPLETE.json`` as the last one, with the size
and SHA-256 of every other, so that a torn, truncated or damaged checkpoint is told from a whole one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ...errors import PeftMoeError
from ...io.atomic import replace_file, sync
from ...tuner.config.weights_file import read_json

SEAL = "COMPLETE.json"
STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
# What the next step depends on besides the weights, by the file's beginning.
_NEEDED = {
    "adapter_model": "the weights",
    "adapter_config.json": "the mixture's config",
    "optimizer": "the optimizer's moments",
    "scheduler": "the learning rate's schedule",
    "rng_state": "the random numbers",
}
_CHUNK = 1 << 20


def unseal(folder: Path) -> None:
    """Before a checkpoint is written over another: what is there now no longer counts as whole."""
    for name in (SEAL, STATE):
        (folder / name).unlink(missing_ok=True)


def seal(folder: Path) -> None:
    """After a checkpoint's last file: bring all of them to the disk, then say so.

    Args:
        folder: the checkpoint; nobody writes to it any more.
    """
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SEAL):
        sync(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    replace_file(
        folder / SEAL, lambda beside: beside.write_text(json.dumps({"files": files}, indent=1) + "\n")
    )
    sync(folder)


def what_is_wrong(folder: str | os.PathLike[str]) -> str | None:
    """Why training cannot go on from a checkpoint as if it had never stopped; None if it can.

    A checkpoint without a seal, such as one of a plain trainer, is whole if the trainer's last file is there
    and all that the next step depends on.
    """
    place = Path(folder)
    if not place.is_dir():
        return "there is no such folder"
    if (place / SEAL).is_file():
        return _broken_seal(place) or _lacks(place)
    try:
        read_json(place / STATE)  # the trainer writes it last
    except PeftMoeError:
        return f"it has no {SEAL}, and {STATE} is missing or cut: the process died while it was written"
    return _lacks(place)


def last_good_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint of a run that is whole; None if there is none.

    Args:
        output_dir: of the trainer.

    Returns:
        A path to give to ``trainer.train(resume_from_checkpoint=…)``.
    """
    place = Path(output_dir)
    found = {path: match for path in place.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))}
    for path in sorted(found, key=lambda path: int(found[path][1]), reverse=True):
        if what_is_wrong(path) is None:
            return str(path)
    return None


def checked_resume(resume: Any, output_dir: str | os.PathLike[str]) -> Any:
    """What to hand to a trainer for ``resume_from_checkpoint``.

    Args:
        resume: True for the last checkpoint that is whole, a path, or nothing.
        output_dir: of the trainer.

    Raises:
        PeftMoeError: no checkpoint is whole, or the one that was named is not.
    """
    if not resume:
        return resume
    if resume is True:
        good = last_good_checkpoint(output_dir)
        if good is None:
            raise PeftMoeError(
                f"resume_from_checkpoint=True: {output_dir} has no checkpoint that is whole; leave it out to "
                "start from the beginning"
            )
        return good
    wrong = what_is_wrong(resume)
    if wrong:
        good = last_good_checkpoint(Path(resume).parent)
        fix = f"the last whole one is {good}" if good else "no checkpoint beside it is whole"
        raise PeftMoeError(
            f"resume_from_checkpoint={str(resume)!r}: {wrong}; {fix}. To start anew from its weights, load "
            "them with PeftModel.from_pretrained(base, folder, is_trainable=True)"
        )
    return resume


def _broken_seal(place: Path) -> str | None:
    try:
        files = read_json(place / SEAL)["files"]
        for name, wanted in files.items():
            path = place / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != wanted["bytes"] or _sha256(path) != wanted["sha256"]:
                return f"{name} is not as it was saved"
    except (PeftMoeError, KeyError, TypeError, AttributeError):
        return f"{SEAL} is damaged"
    return None


def _lacks(place: Path) -> str | None:
    names = [path.name for path in place.rglob("*") if path.is_file()]
    if any(path.is_dir() for path in place.glob("*optimizer*")) or any(place.glob("global_step*")):
        return None  # FSDP and DeepSpeed keep folders of their own
    for start, what in _NEEDED.items():
        if not any(name.startswith(start) for name in names):
            return f"it has no {start}*: {what} would start anew, and with it another run"
    for weights in place.rglob("adapter_model.safetensors"):
        try:
            with safe_open(str(weights), framework="pt", device="cpu"):
                pass
        except (SafetensorError, OSError, ValueError, RuntimeError):
            return f"{weights.relative_to(place)} is damaged"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
