"""A folder of results appears whole or not at all: written beside its place, then renamed into it."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import PeftMoeError

# Of Linux' renameat2 (paths relative to the working folder) and of macOS' renamex_np.
_HERE, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2


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

    What was there is replaced in one step; if the block raises, or the process dies at any moment, it stays
    as it was. What a dead process left beside it is removed by the next one that writes there.

    Args:
        place: from :func:`check_new_folder`.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    _sweep(place)
    with _locked_folder(place) as beside:
        try:
            yield beside
            _flush(beside)
            _put(beside, place)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside ``path`` and rename it over it: a reader, or a crash, sees the old one or the new.

    Args:
        path: the file to be.
        write: called with the path to write to.
    """
    beside = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.new"
    try:
        write(beside)
        sync(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _put(beside: Path, place: Path) -> None:
    if not place.exists():
        os.rename(beside, place)
    elif not _exchange(beside, place):
        # Two steps where the system has no single one; between them the old folder is whole, under this name.
        old = beside.with_suffix(".old")
        os.rename(place, old)
        try:
            os.rename(beside, place)
        except BaseException:
            os.rename(old, place)
            raise
        shutil.rmtree(old, ignore_errors=True)
    with suppress(
        OSError
    ):  # the new folder is there, whole; only a power cut could still bring the old one back
        sync(place.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change names in one step; False where the system or its file system cannot."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        names = os.fsencode(one), os.fsencode(other)
        if hasattr(libc, "renameat2"):  # Linux
            return int(libc.renameat2(_HERE, names[0], _HERE, names[1], _RENAME_EXCHANGE)) == 0
        return int(libc.renamex_np(*names, _RENAME_SWAP)) == 0  # macOS
    except (OSError, AttributeError, TypeError):
        return False


@contextmanager
def _locked_folder(place: Path) -> Iterator[Path]:
    """A new folder beside ``place`` that tells others, until it is closed, that its writer lives."""
    while True:
        beside = place.parent / f".{place.name}.{uuid.uuid4().hex[:8]}.new"
        beside.mkdir()
        with _lock(beside) as held:
            if held and beside.exists():  # nobody swept it before it was locked
                yield beside
                return


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Whether nobody else holds ``folder``; ours until the block ends, or this process does."""
    try:
        import fcntl
    except ImportError:  # Windows: nobody sweeps there
        yield True
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(handle)


def _sweep(place: Path) -> None:
    """Remove what dead writers of ``place`` left beside it."""
    if os.name != "posix":
        return
    for left in place.parent.glob(f".{glob.escape(place.name)}.????????.new"):
        with suppress(OSError), _lock(left) as free:
            if free:
                shutil.rmtree(left, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Bytes before the name: a crash must not leave the new name over empty files."""
    for path in sorted([*folder.rglob("*"), folder]):
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot sync a folder; a file that cannot be synced is not written.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
