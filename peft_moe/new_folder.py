"""A folder of results appears whole or not at all: written beside its place, then renamed into it."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import PeftMoeError


def check_new_folder(
    out: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]] = (), *, overwrite: bool = False
) -> Path:
    """Refuse a place that must not be written to, before any work is done.

    Args:
        out: the folder to be.
        inputs: folders that are read meanwhile; ``out`` may not overlap with them.
        overwrite: whether an existing folder may be replaced.

    Returns:
        ``out`` as an absolute path, with links in its parents resolved.

    Raises:
        PeftMoeError: it is a link, a file, not empty, or in the way of an input.
    """
    given = Path(out).expanduser()
    if given.is_symlink():
        raise PeftMoeError(f"{given} is a symbolic link; name the folder that it points to")
    place = given.parent.resolve() / given.name
    for one in inputs:
        source = Path(one).expanduser().resolve()
        if source.exists() and (place.is_relative_to(source) or source.is_relative_to(place)):
            raise PeftMoeError(f"{given} and the input {source} overlap; choose another folder to write to")
    if place.is_file():
        raise PeftMoeError(f"{given} is a file; choose another name for the folder to write")
    if place.is_dir() and any(place.iterdir()) and not overwrite:
        raise PeftMoeError(f"{given} exists and is not empty; choose another folder, or pass --overwrite")
    return place


@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """An empty folder beside ``place``, which takes its place if the block ends well.

    What was there is replaced; if the block raises, it stays as it was and nothing is left beside it.

    Args:
        place: from :func:`check_new_folder`.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    beside = place.parent / f".{place.name}.{mark}.new"
    beside.mkdir()
    try:
        yield beside
        _flush(beside)
        if place.exists():
            old = place.parent / f".{place.name}.{mark}.old"
            os.rename(place, old)
            os.rename(beside, place)
            shutil.rmtree(old)
        else:
            os.rename(beside, place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Bytes before the name: a crash must not leave the new name over empty files."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
