"""JSON files that readers never see half written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .atomic import replace_file


def write_json(path: Path, data: Any, *, indent: int | None = None) -> None:
    """Write plain data as JSON and rename the file into place; missing folders are created.

    Args:
        path: the file to write.
        data: the data; NaN and infinities are written as Python's ``json`` writes them.
        indent: spaces per level; None writes a single line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, indent=indent) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
