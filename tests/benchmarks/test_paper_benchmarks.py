"""The reproductions of papers run from end to end on a tiny random base, and go on where they stopped."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

# How many cells a seed has with the base, and a name of each part of the page.
RUNS = {
    "paper_mixing": (
        34,
        ["FFN on law/gate-less/4", "LoRA-FFN/trained/2", "## Claims", "Gate-less is highly"],
    ),
    "modular_text": (
        20,
        ["MoE-CE, common off", "tf-idf | prompt", "Adaptive α is like fixed α", "not tested"],
    ),
}


@pytest.mark.parametrize("script", RUNS)
def test_a_quick_run_makes_every_cell_once_and_the_page(script: str, tmp_path: Path, monkeypatch) -> None:
    count, parts = RUNS[script]
    module = importlib.import_module(f"benchmarks.{script}")
    words = ["--quick", "--seeds", "0", "--out", str(tmp_path / "out"), "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [script, *words, "--publish", "page"])
    module.main()
    cells = (tmp_path / "out" / "cells.jsonl").read_text()
    names = [json.loads(line)["method"] for line in cells.splitlines()]
    assert len(set(names)) == len(names) == count
    page = (tmp_path / "page.md").read_text()
    assert all(part in page for part in parts)
    assert not any(f"`{name}`" not in page for name in names if "prompt" not in name and "text" not in name)
    claims = json.loads((tmp_path / "page.json").read_text())["claims"]
    assert {row["verdict"] for row in claims} <= {
        "held",
        "did not hold",
        "not decidable here",
        "not tested",
    }
    module.main()
    assert (tmp_path / "out" / "cells.jsonl").read_text() == cells
