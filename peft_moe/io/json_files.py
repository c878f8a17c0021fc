"""JSON files: read strictly, and never seen half written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import PeftMoeError
from .atomic import replace_file


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        PeftMoeError: the file cannot be read, holds no JSON object, or has a key twice.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        raise PeftMoeError(f"{path} cannot be read as JSON: {error}; copy the folder again") from error
    if not isinstance(values, dict):
        raise PeftMoeError(f"{path} holds no JSON object; copy the folder again")
    return values


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of pairs, for ``object_pairs_hook``; json itself keeps the last of two equal keys.

    Raises:
        ValueError: a key appears twice.
    """
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} appears twice")
    return values


def write_json(path: Path, data: Any, *, indent: int | None = None, strict: bool = False) -> None:
    """Write plain data as JSON and rename the file into place; missing folders are created.

    Args:
        path: the file to write.
        data: the data; NaN and infinities are written as Python's ``json`` writes them.
        indent: spaces per level; None writes a single line.
        strict: whether keys are sorted, and NaN and infinities raise ValueError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, indent=indent, sort_keys=strict, allow_nan=not strict) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
