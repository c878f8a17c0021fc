"""JSON files are complete or absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_moe.io.json_files import write_json


def test_data_come_back_and_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "data.json"
    write_json(path, {"é": [1, 2.5, None]}, indent=1)
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": [1, 2.5, None]}
    assert list(path.parent.iterdir()) == [path]


def test_data_that_json_lacks_leave_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    write_json(path, {"old": True})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": True}
    assert list(tmp_path.iterdir()) == [path]
