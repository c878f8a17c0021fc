"""The calibration of the cost model runs, recovers the constants behind exact times, and writes an entry."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks.calibrate import CPU, FITTED, Timed, fit, main
from peft_moe.ops import BACKENDS, call_spec_of
from peft_moe.ops.device_costs import SHIPPED, read_devices


def test_exact_times_give_back_the_constants_behind_them():
    shipped = SHIPPED["cpu", "float32"]
    made = replace(
        shipped, passes=5.0, per_rank=2e-9, launch=3e-5, segment=4e-6, sort=5e-5, weight_bandwidth=1e10
    )
    shapes = [shape for shape in CPU if shape.tokens * shape.out <= 512 * 1024]
    specs = [call_spec_of(Timed(shape, torch.float32, "cpu").inputs()) for shape in shapes]
    fitted = shipped
    for name in FITTED:
        cases = [(spec, {name: BACKENDS[name].cost(spec, made)}) for spec in specs]
        fitted = fit(name, cases, fitted)
    for key, value in asdict(made).items():
        if isinstance(value, float):
            assert getattr(fitted, key) == pytest.approx(value, rel=1e-3), key


def test_a_quick_run_writes_an_entry_and_keeps_the_others(tmp_path, capsys):
    file = tmp_path / "devices.json"
    file.write_text(json.dumps({"other": {"source": "elsewhere"}}))
    threads = torch.get_num_threads()
    main(["--quick", "--write", "--file", str(file)])
    torch.set_num_threads(threads)
    entries = json.loads(file.read_text())
    assert entries["other"] == {"source": "elsewhere"}
    assert {"bfloat16", "float32", "source"} == set(entries["cpu"])
    assert ("cpu", "bfloat16") in read_devices(file.read_text())
    assert "measured us" in capsys.readouterr().out
