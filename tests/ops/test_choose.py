"""The choice of a backend is a pure function of a call's sizes and of the device's constants."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch

from peft_moe.errors import PeftMoeError
from peft_moe.ops import BACKENDS, CallSpec, RankMap, choose
from peft_moe.ops import device_costs as constants_file
from peft_moe.ops.backend import NEVER_CHEAPEST
from peft_moe.ops.device_costs import DEVICES, SHIPPED, constants_for, read_devices
from peft_moe.ops.triton import kernel_backends as triton_backends

H100 = "NVIDIA H100 80GB HBM3"
PAGE = Path(__file__).parents[2] / "benchmarks" / "results" / "2026-11-26-h100-layer.md"
BF16 = torch.bfloat16
TRITON = [name for name in BACKENDS if name.startswith("triton")]
MICRO = 1e-6


def spec(tokens=512, experts=8, rank=16, chosen=2, size=1024, **changes):
    defaults = {"device": "cpu", "trains": frozenset(), "compiling": False, "one_row": False, "dtype": BF16}
    width, out = size if isinstance(size, tuple) else (size, size)
    ranks = RankMap((rank,) * experts, (1.0,) * experts)
    return CallSpec(
        tokens=tokens,
        in_features=width,
        out_features=out,
        ranks=ranks,
        chosen=chosen,
        **{**defaults, **changes},
    )


@pytest.fixture
def h100(monkeypatch):
    """Make the package choose as on a machine with that GPU."""
    monkeypatch.setattr(triton_backends, "_unavailable", lambda: None)
    monkeypatch.setattr(constants_file, "_gpu", lambda: H100)
    monkeypatch.setattr("peft_moe.ops.backends.grouped._has_kernel", lambda: True)


class TestOnACpu:
    # The backend that was clearly faster on one thread of a Zen 5 core, in a top-2 forward pass.
    @pytest.mark.parametrize(
        ("size", "tokens", "experts", "rank", "faster"),
        [
            *((1024, 512, e, r, "stacked") for e, r in [(4, 8), (4, 16), (8, 8), (8, 16), (32, 8)]),
            *((1024, 512, e, r, "grouped") for e, r in [(8, 64), (32, 64), (128, 16), (128, 64)]),
            ((2048, 5504), 512, 32, 16, "grouped"),
            ((2048, 5504), 512, 128, 16, "grouped"),
            ((2048, 5504), 512, 128, 64, "grouped"),
            ((2048, 5504), 2048, 8, 16, "stacked"),
            ((2048, 5504), 2048, 32, 16, "grouped"),
            ((2048, 5504), 2048, 128, 16, "grouped"),
            (1024, 2048, 32, 16, "grouped"),
        ],
    )
    def test_the_faster_backend_as_measured(self, size, tokens, experts, rank, faster):
        assert choose(spec(tokens, experts, rank, size=size)).backend.name == faster

    def test_float32_switches_to_grouped_earlier(self):
        at_128 = [choose(spec(512, 8, 16, dtype=dtype)).backend.name for dtype in (BF16, torch.float32)]
        assert at_128 == ["stacked", "grouped"]

    @pytest.mark.parametrize(("experts", "rank"), [(32, 16), (128, 16), (128, 64)])
    def test_one_token_reads_its_experts_only(self, experts, rank):
        assert choose(spec(1, experts, rank)).backend.name == "gather"

    def test_gather_never_serves_many_tokens(self):
        # Only gather is left of the sparse backends, and it would copy a gigabyte of slabs.
        choice = choose(spec(2048, 128, 64, compiling=True))
        assert choice.costs["gather"] == NEVER_CHEAPEST

    def test_dense_gates_take_all_experts(self):
        choice = choose(spec(chosen=None))
        assert choice.backend.name == "stacked"
        assert "top_k" in choice.refused["grouped"]
        assert "top_k" in choice.refused["gather"]

    def test_one_row_of_gates_is_one_lora(self):
        assert choose(spec(2048, chosen=None, one_row=True)).backend.name == "folded"

    def test_a_compiler_gets_what_it_can_trace(self):
        choice = choose(spec(2048, 128, 64, compiling=True))
        assert choice.backend.name == "stacked"
        assert "trace" in choice.refused["grouped"]


class TestOverride:
    def test_by_name(self):
        for name in ("stacked", "grouped", "gather", "reference"):
            choice = choose(spec(), name)
            assert (choice.backend.name, choice.asked) == (name, name)

    @pytest.mark.parametrize(
        ("name", "call", "reason"),
        [
            ("grouped", {"chosen": None}, "top_k"),
            ("gather", {"chosen": None}, "top_k"),
            ("grouped", {"compiling": True}, "trace"),
            ("folded", {}, "token to token"),
            ("triton_sorted", {}, "on cpu"),
        ],
    )
    def test_a_backend_that_cannot_serve_raises(self, name, call, reason):
        with pytest.raises(PeftMoeError, match=f"backend='{name}'.*{reason}.*backend='auto'"):
            choose(spec(**call), name)

    def test_unknown_names_get_near_ones(self):
        with pytest.raises(PeftMoeError, match="stacked"):
            choose(spec(), "staked")

    def test_the_choice_explains_itself(self, caplog):
        with caplog.at_level(logging.DEBUG, logger="peft_moe.ops.choose"):
            explanation = choose(spec(one_row=False)).explain()
        assert re.search(r"stacked: cheapest by the model\n  stacked: \d+\.\d us predicted", explanation)
        assert "folded: not here, its gates differ" in explanation
        assert "512 tokens" in caplog.text


class TestOnAnH100:
    def rows(self):
        """Yield the rows of the measured table: call, tokens, experts, rank, seconds added by each method."""
        text = PAGE.read_text(encoding="utf-8")
        lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
        heads, _, *body = [[cell.strip() for cell in line] for line in lines]
        for line in body:
            cells = dict(zip(heads, line, strict=True))
            experts, rank = map(int, cells["experts"].split("×"))
            base = float(cells["base µs"]) * MICRO
            added = {
                name: (float(cells[name]) - 1) * base
                for name in heads[5:-1]
                if re.fullmatch(r"[\d.]+", cells[name])
            }
            yield cells["call"], int(cells["T"]), experts, rank, added

    def lora(self, tokens, rank, size=4096):
        """Predict one eager LoRA from the constants: two products, a pass to scale and a pass to add."""
        constants = SHIPPED[H100, "bfloat16"]
        arithmetic, row = 2 * tokens * rank * size / constants.flops, 2 * tokens * size / constants.bandwidth
        factor = 2 * rank * size / constants.bandwidth
        return 2 * max(arithmetic, row + factor) + 2 * row + 3 * row + 4 * 3.4 * MICRO

    def test_the_constants_give_the_measured_loras(self):
        seen = 0
        for call, tokens, experts, rank, added in self.rows():
            if call == "train":
                continue
            for name, total in (("LoRA r", rank), ("LoRA k·r", 2 * rank), ("LoRA E·r", experts * rank)):
                # A short call is some ten microseconds of launches; a long one follows the measured rates.
                close = 0.1 if tokens == 4096 else 0.25
                assert self.lora(tokens, total) == pytest.approx(added[name], rel=close), (tokens, name)
                seen += 1
        assert seen == 12

    @pytest.mark.usefixtures("h100")
    def test_a_kernel_is_chosen_only_where_it_was_timed_and_wins(self):
        chosen = {}
        for call, tokens, experts, rank, added in self.rows():
            trains = frozenset({"x", "gates"} if call == "train" else ())
            choice = choose(spec(tokens, experts, rank, size=4096, device="cuda", trains=trains))
            name = choice.backend.name
            chosen[call, tokens, experts] = name
            if name in TRITON:
                measured = added[name.replace("triton_", "Triton ")]
                assert choice.costs[name] == pytest.approx(measured, rel=0.1)
                # Torch's backends were not timed there; even at the measured rates they would be slower.
                assert measured < min(c for n, c in choice.costs.items() if n not in TRITON)
                assert measured < added["LoRA E·r"]
        kernels = {at: name for at, name in chosen.items() if name in TRITON}
        assert kernels == {("fwd", 4096, 128): "triton_sorted"}

    @pytest.mark.usefixtures("h100")
    @pytest.mark.parametrize(
        "call",
        [
            {"tokens": 2048},  # not timed
            {"trains": frozenset({"gates"})},  # timed, and slower
            {"dtype": torch.float16},  # not timed
        ],
    )
    def test_where_it_was_not_timed_it_serves_only_by_name(self, call):
        call = spec(**{"tokens": 8192, "experts": 128, "size": 4096, "device": "cuda", **call})
        assert choose(call).backend.name not in TRITON
        assert choose(call, "triton_sorted").backend.name == "triton_sorted"

    def test_other_gpus_choose_no_kernel(self, monkeypatch):
        monkeypatch.setattr(triton_backends, "_unavailable", lambda: None)
        monkeypatch.setattr(constants_file, "_gpu", lambda: "NVIDIA Something")
        monkeypatch.setattr("peft_moe.ops.backends.grouped._has_kernel", lambda: True)
        call = spec(8192, 128, size=4096, device="cuda")
        assert constants_for("cuda", BF16) == SHIPPED["cuda", "bfloat16"]
        assert choose(call).backend.name not in TRITON


def test_unmeasured_dtypes_and_devices_get_similar_constants():
    assert constants_for("cpu", torch.float16) == SHIPPED["cpu", "float32"]
    assert constants_for("xpu", BF16) == SHIPPED["cpu", "float32"]


def test_every_entry_says_where_it_comes_from():
    text = DEVICES.read_text(encoding="utf-8")
    assert all(entry["source"] for entry in json.loads(text).values())
    for constants in read_devices(text).values():
        rates = (constants.flops, constants.bandwidth, constants.weight_bandwidth)
        assert all(rate > 1e9 for rate in rates)
        fixed_costs = (constants.per_rank, constants.launch, constants.segment, constants.sort)
        assert all(0 <= cost < 1e-3 for cost in fixed_costs)
        assert set(constants.kernels) <= set(TRITON)
