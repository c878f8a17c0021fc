"""Reading many adapters: one layer at a time, with little more memory than what comes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging

BENCH = Path(__file__).parents[2]
MIB = 2**20


def loading(*words: str) -> dict:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.suite.loading", *words]
    environment = {**os.environ, "PYTHONPATH": str(BENCH)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=BENCH, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_is_the_mixture_and_one_adapter():
    found = loading("--width", "512", "--inner", "2048", "--layers", "8", "--experts", "48")
    assert found["experts"] == 48
    factors = found["mixture_mib"] - found["routers_mib"]
    assert factors == pytest.approx(48 * found["adapter_mib"], rel=0.01)
    assert found["mixture_mib"] > 100
    # Python's own objects of 56 layers and what malloc keeps; mapped files would cost 100 MiB and more.
    assert found["peak_mib"] <= found["mixture_mib"] + found["adapter_mib"] + 24


def test_a_progress_bar_counts_layers_where_reading_takes_a_while(monkeypatch, zoo, capsys):
    monkeypatch.setattr("peft_moe.tuner.layers.expert_factors.PATIENCE", 0.0)
    transformers_logging.enable_progress_bar()  # a fixture of another test may have silenced it
    zoo.mixture("llama")
    told = capsys.readouterr().err
    assert "Reading 3 experts: 100%" in told
    assert "layer/s" in told
    monkeypatch.undo()
    zoo.mixture("llama")
    assert "Reading" not in capsys.readouterr().err
