"""Checkpoints of a training run that may be killed at any moment: which are complete.

A trainer writes a checkpoint file by file. ``seal`` writes ``COMPLETE.json`` as the last file, with the size
and SHA-256 of all others. The seal tells a complete checkpoint from a partial, truncated or damaged one.
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
from ...io.json_files import read_json

SEAL = "COMPLETE.json"
STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
# What the next step depends on, by the first part of the file's name.
_REQUIRED = {
    "adapter_model": "the weights",
    "adapter_config.json": "the mixture's config",
    "optimizer": "the optimizer's moments",
    "scheduler": "the learning rate's schedule",
    "rng_state": "the random numbers",
}


def unseal(folder: Path) -> None:
    """Mark a checkpoint as incomplete before it is overwritten."""
    for name in (SEAL, STATE):
        (folder / name).unlink(missing_ok=True)


def seal(folder: Path) -> None:
    """Flush all files of a finished checkpoint to the disk, then write the seal.

    Args:
        folder: the checkpoint, after its last file is written.
    """
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SEAL):
        sync(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    replace_file(
        folder / SEAL, lambda temporary: temporary.write_text(json.dumps({"files": files}, indent=1) + "\n")
    )
    sync(folder)


def checkpoint_fault(folder: str | os.PathLike[str]) -> str | None:
    """Return why training cannot resume exactly from a checkpoint, or None if it can.

    A checkpoint without a seal, such as one of a plain trainer, is complete if it contains the file that the
    trainer writes last and everything that the next step depends on.
    """
    path = Path(folder)
    if not path.is_dir():
        return "there is no such folder"
    if (path / SEAL).is_file():
        return _seal_fault(path) or _missing_state(path)
    try:
        read_json(path / STATE)  # the trainer writes it last
    except PeftMoeError:
        return f"it has no {SEAL}, and {STATE} is missing or truncated: the process died while it was written"
    return _missing_state(path)


def last_good_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Return the newest complete checkpoint of a run, or None if there is none.

    Args:
        output_dir: the trainer's output folder.

    Returns:
        A path to give to ``trainer.train(resume_from_checkpoint=…)``.
    """
    folders = Path(output_dir).glob("checkpoint-*")
    steps = {path: int(match[1]) for path in folders if (match := _NAME.fullmatch(path.name))}
    for path in sorted(steps, key=steps.__getitem__, reverse=True):
        if checkpoint_fault(path) is None:
            return str(path)
    return None


def checked_resume(resume: Any, output_dir: str | os.PathLike[str]) -> Any:
    """Return the checked value of ``resume_from_checkpoint`` for a trainer.

    Args:
        resume: True for the newest complete checkpoint, a path, or None or False for none.
        output_dir: the trainer's output folder.

    Raises:
        PeftMoeError: no checkpoint is complete, or the given one is not.
    """
    if not resume:
        return resume
    if resume is True:
        good = last_good_checkpoint(output_dir)
        if good is None:
            raise PeftMoeError(
                f"resume_from_checkpoint=True: {output_dir} has no complete checkpoint; leave it out to "
                "start from the beginning"
            )
        return good
    fault = checkpoint_fault(resume)
    if fault:
        good = last_good_checkpoint(Path(resume).parent)
        fix = f"the last complete one is {good}" if good else "no checkpoint beside it is complete"
        raise PeftMoeError(
            f"resume_from_checkpoint={str(resume)!r}: {fault}; {fix}. To start a new run from its weights, "
            "load them with PeftModel.from_pretrained(base, folder, is_trainable=True)"
        )
    return resume


def _seal_fault(folder: Path) -> str | None:
    """Return which file differs from the seal, or None if all agree with it."""
    try:
        files = read_json(folder / SEAL)["files"]
        for name, saved in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != saved["bytes"] or _sha256(path) != saved["sha256"]:
                return f"{name} differs from what was saved"
    except (PeftMoeError, KeyError, TypeError, AttributeError):
        return f"{SEAL} is damaged"
    return None


def _missing_state(folder: Path) -> str | None:
    """Return what the next step depends on and the checkpoint lacks, or None if it lacks nothing."""
    names = [path.name for path in folder.rglob("*") if path.is_file()]
    if any(path.is_dir() for path in folder.glob("*optimizer*")) or any(folder.glob("global_step*")):
        return None  # FSDP and DeepSpeed keep folders of their own
    for prefix, content in _REQUIRED.items():
        if not any(name.startswith(prefix) for name in names):
            return f"it has no {prefix}*: {content} would start anew, which would be another run"
    for weights in folder.rglob("adapter_model.safetensors"):
        try:
            with safe_open(str(weights), framework="pt", device="cpu"):
                pass
        except (SafetensorError, OSError, ValueError, RuntimeError):
            return f"{weights.relative_to(folder)} is damaged"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
