"""The benchmark suite runs, checks every method, and prints nothing if one computes a wrong result."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.suite import clock, parity
from benchmarks.suite.__main__ import main
from benchmarks.suite.clock import Spread, Variant, interleave, ratios
from benchmarks.suite.experts import DTYPE, TINY_LLAMA, Case
from benchmarks.suite.floors import floor
from benchmarks.suite.goals import goals
from benchmarks.suite.machine import Peaks
from benchmarks.suite.memory import allocated_peak
from benchmarks.suite.methods import build
from benchmarks.suite.models import FULL, GOAL, training_step
from benchmarks.suite.results import BEST_PEER, OURS, TOTAL, Row

LAYER = Case(experts=4, rank=8, width=64, out=96, tokens=16)
MODEL = Case(experts=4, rank=8, sizes=TINY_LLAMA, tokens=16)
# mergoo takes part only where a full run has installed it.
ALWAYS = {"base", "LoRA r", "LoRA k·r", "LoRA E·r", "PEFT X-LoRA", "PEFT Arrow", "ours"}


def lines(folder):
    (path,) = folder.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_quick_run_prints_and_saves_every_method(tmp_path, capsys):
    for levels in (["layer"], ["models"]):
        assert main(["--quick", "--levels", *levels, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    rows = lines(tmp_path)
    for level in ("prefill", "decode", "layer"):
        names = {row["contestant"] for row in rows if row["level"] == level}
        assert names >= ALWAYS, level
    trained = {row["contestant"] for row in rows if row["level"] == "training"}
    assert trained >= ALWAYS - {"PEFT Arrow"}  # which has nothing to train
    assert all(row["ms"][1] > 0 and row["versions"]["commit"] for row in rows)
    assert all(row["to"]["base"] == [1, 1, 1] for row in rows if row["contestant"] == "base")
    (path,) = tmp_path.glob("*.md")
    page = path.read_text(encoding="utf-8")
    assert page.count("## Benchmark") - page.count("### Benchmark") == 2  # appended, not replaced
    assert "÷ best peer" in printed
    assert printed.count("### Where the time goes") == 3


def test_a_failed_parity_check_leaves_no_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parity, "FP32_BOUND", 0.0)
    assert main(["--quick", "--levels", "layer", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", [LAYER, MODEL], ids=["layer", "model"])
def test_parity_finds_one_wrong_number_in_any_method(case):
    methods, _, experts = build(case)
    torch.manual_seed(0)
    one_layer = case.width is not None
    inputs = torch.randn(2, 16, case.width).to(DTYPE) if one_layer else torch.randint(0, 64, (2, 16))
    for name, method in methods.items():
        parity.check(name, method, experts, inputs)
        factors = [p for key, p in method.model.named_parameters() if "lora_B" in key and "arrow" not in key]
        if name == "base":
            assert not factors
            continue
        with torch.no_grad():
            factors[-1][0] *= 1.05  # one row of a factor is 5 % too large
        with pytest.raises(parity.ParityError, match=name):
            parity.check(name, method, experts, inputs)


def test_parity_leaves_the_timed_weights_as_they_were():
    methods, _, experts = build(LAYER, ["ours"])
    before = {key: (p.data_ptr(), p.dtype) for key, p in methods["ours"].model.named_parameters()}
    parity.check("ours", methods["ours"], experts, torch.randn(2, 16, 64).to(DTYPE))
    assert before == {key: (p.data_ptr(), p.dtype) for key, p in methods["ours"].model.named_parameters()}


def test_rounds_interleave_and_ratios_are_of_one_round():
    calls: list[str] = []
    variants = {name: Variant(lambda name=name: calls.append(name)) for name in "ab"}
    times = interleave(variants, budget=0, fewest=3)
    # The first pair measures how many rounds fit; then every short call follows an uncounted one.
    assert calls[:2] == ["a", "b"]
    assert calls[2::2] == calls[3::2] == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    # Both variants slow down together, so their ratio is constant.
    assert ratios({"a": [2.0, 4.0, 8.0], "b": [1.0, 2.0, 4.0]}, "a", "b").middle == 2.0


def test_long_calls_are_not_made_twice(monkeypatch):
    monkeypatch.setattr(clock, "_SHORT", 0.0)
    calls: list[str] = []
    interleave({name: Variant(lambda name=name: calls.append(name)) for name in "ab"}, budget=0, fewest=2)
    assert calls == ["a", "b", "a", "b", "b", "a"]


def test_floor_of_a_layer_by_hand():
    peaks = Peaks({DTYPE: 1e9}, 1e30)  # no time for traffic
    layer_floor = floor(Case(experts=4, rank=8, top_k=2, width=10, out=20, batch=1, tokens=3), "ours", peaks)
    assert layer_floor.flops == 2 * 3 * 10 * 20 + 2 * 3 * 2 * 8 * (10 + 20)
    assert layer_floor.seconds == pytest.approx(layer_floor.flops / 1e9)
    traffic = Peaks({DTYPE: 1e30}, 1.0)  # no time for arithmetic
    slow = floor(Case(experts=4, rank=8, width=10, out=20, batch=1, tokens=3), "base", traffic)
    assert slow.seconds == slow.bytes == 2 * (3 * 10 + 3 * 20 + 10 * 20)


def test_goals_are_met_or_missed_by_the_figures():
    def row(level, case, name, ratio):
        same = Spread(ratio, ratio, ratio)
        return Row(level, "step", case, name, milliseconds=same, to={TOTAL: same, BEST_PEER: same})

    rows = [row("prefill", GOAL, OURS, 1.09), row("training", GOAL, OURS, 1.11)]
    rows += [row("prefill", FULL, OURS, 1.0), row("prefill", FULL, "PEFT X-LoRA", 7.9)]
    for each in rows:
        each.extra["best_peer"] = "mergoo"
    lines = goals(rows).splitlines()
    assert [line.split("|")[-2].strip() for line in lines[4:]] == [
        "met",
        "**missed**",
        "**missed**",
        "**missed**",
    ]
    assert "slower at 2 of 3 points; worst 1.11 × mergoo" in lines[-1]
    assert goals([]) == ""


@pytest.mark.slow  # half a minute: one process per method for its memory
def test_all_levels_in_a_quick_run(tmp_path):
    assert main(["--quick", "--out", str(tmp_path)]) == 0
    rows = lines(tmp_path)
    assert {row["level"] for row in rows} == {
        "prefill", "decode", "training", "layer", "memory", "loading", "routers"
    }  # fmt: skip
    memory = [row for row in rows if row["level"] == "memory"]
    assert memory
    assert all(row["allocated_mib"] > row["saved_mib"] > 0 for row in memory)


def test_allocations_are_counted_at_their_peak():
    def run():
        x = torch.ones(2**20)  # 4 MiB
        y = x + 1
        del x
        y.add_(1)
        return y.sum()  # a few more bytes

    peaks = {allocated_peak(run) for _ in range(3)}
    assert len(peaks) == 1
    assert 0 <= peaks.pop() - 8 * 2**20 < 64


def test_a_training_step_of_routers_takes_less_memory_than_one_of_a_lora_of_all_ranks():
    torch.manual_seed(0)
    ids = torch.randint(0, FULL.sizes["vocab_size"], (FULL.batch, FULL.tokens))
    methods, _, _ = build(FULL, ["ours", "LoRA E·r"])
    peaks = {}
    for name, method in methods.items():
        step = training_step(method, ids)
        step.run()
        peaks[name] = allocated_peak(step.run)
    assert peaks["ours"] < peaks["LoRA E·r"]
