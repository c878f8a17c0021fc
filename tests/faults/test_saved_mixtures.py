"""Sections B, C and D: a saved mixture whose config or weights are damaged, foreign, or forged."""

from __future__ import annotations

import dataclasses
import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from support.batches import logits_of
from support.zoo import Zoo
from torch import Tensor

from faults.harness import (
    BATCH,
    CONFIG,
    WEIGHTS,
    Bench,
    Row,
    check_refused,
    edit,
    edit_bytes,
    edit_record,
    edit_tensors,
    load,
    load_learning,
    load_over,
    load_safely,
    load_second,
    parametrized,
)
from peft_moe import MoLoraConfig, load_mixture
from peft_moe.experts.spec import ExpertSpec

Spoil = Callable[[Bench], object]


def write(text: bytes) -> Spoil:
    return lambda bench: (bench.mixture / CONFIG).write_bytes(text)


def drop(name: str) -> Spoil:
    def spoil(bench: Bench) -> None:
        path = bench.mixture / CONFIG
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != name}))

    return spoil


def twice(bench: Bench) -> None:
    edit_bytes(
        bench.mixture / CONFIG, lambda d: d.replace(b'"router": ', b'"router": "uniform",\n  "router": ')
    )


# -- the config as a file ----------------------------------------------------------------------------

ADAPTER = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}
CONFIG_ROWS = [
    Row("B18", "empty", write(b""), (CONFIG, "JSON", "copy the folder again"), load_safely),
    Row("B18", "cut", write(b'{"peft_type": "MOLORA", '), (CONFIG, "JSON", "copy"), load_safely),
    Row("B18", "not UTF-8", write(b'{"r": "\xff"}'), (CONFIG, "JSON", "utf-8"), load_safely),
    Row("B18", "a list", write(b"[1]"), (CONFIG, "no JSON object"), load_safely),
    Row("B18", "nested deeply", write(b"[" * 100000), (CONFIG, "JSON", "copy"), load_safely),
    Row(
        "B18", "a number of 5000 digits", write(b'{"r": ' + b"9" * 5000 + b"}"), (CONFIG, "JSON"), load_safely
    ),
    Row("B18", "no peft_type", drop("peft_type"), (CONFIG, "peft_type=None", "'MOLORA'"), load_safely),
    Row(
        "B18",
        "another method",
        lambda b: edit(b.mixture, peft_type="LOHA"),
        ("peft_type='LOHA'", "PeftModel.from_pretrained"),
        load_safely,
    ),
    Row("B18", "lost", lambda b: (b.mixture / CONFIG).unlink(), ("no adapter_config.json",), load_safely),
    Row("B12", "a key twice", twice, ("'router' appears twice",), load_safely),
    Row("B12", "a key twice, by PEFT", twice, ("'router' appears twice",), load),
    Row("B12", "a key twice, beside a live one", twice, ("'router' appears twice",), load_second),
    Row(
        "B19",
        "a newer format",
        lambda b: edit(b.mixture, format_version=99),
        ("format_version=99", "upgrade"),
    ),
]


@parametrized(CONFIG_ROWS)
def test_the_config_as_a_file(row: Row, zoo: Zoo, tmp_path: Path) -> None:
    check_refused(row, Bench(zoo, tmp_path))


# -- every field of the config, and of the records in it ---------------------------------------------

# PEFT's own, which its base classes read; one value of every other field that cannot be.
INHERITED = {field.name for field in dataclasses.fields(PeftConfig)}
OURS = [f.name for f in dataclasses.fields(MoLoraConfig) if f.init and f.name not in INHERITED]
# Numbers, truths and choices are refused as an object; these take one, or name what they hold.
IMPOSSIBLE: dict[str, Any] = {
    "experts": {"a": 1},
    "trainable_token_indices": {"embed_tokens": 3},
    "base_fingerprint": {"values": 3},
}
FIELD_ROWS = [
    Row(
        "B4",
        f"MoLoraConfig.{name}",
        lambda b, name=name: edit(b.mixture, **{name: IMPOSSIBLE.get(name, {"not": "it"})}),
        (name,),
    )
    for name in OURS
]
VALUES: list[tuple[str, str, Any]] = [
    *(("B4", "top_k", value) for value in (0, -1, 1.5, "2", True)),
    ("B3", "top_k", 3),
    ("B3", "top_k_per_layer", [3]),
    ("B1", "experts", []),
    ("B1", "experts", 0),
    ("B19", "format_version", 99),
]
FIELD_ROWS += [
    Row(fault, f"{name}={value!r}", lambda b, n=name, v=value: edit(b.mixture, **{n: v}), (name,))
    for fault, name, value in VALUES
]


@parametrized(FIELD_ROWS)
def test_a_field_of_the_saved_config(row: Row, zoo: Zoo, tmp_path: Path) -> None:
    check_refused(row, Bench(zoo, tmp_path))


WRONG: dict[str, list[Any]] = {
    "name": [None, 3, "", "a.b", "a/b", "../x", "/abs", "a b", "a\n", "é", "x" * 65],
    "source": [3],
    "revision": [["main"]],
    "sha256": [1],
    "digest": [True],
    "base_model": [{}],
    "license": [7],
    "dtype": [16, "float31", "int8"],
    "r": [0, -1, "8", 2.5, None, True],
    "lora_alpha": [0, -4, "16", None, float("nan"), float("inf")],
    "use_rslora": ["yes", 1],
    "rank_pattern": [[4], {"q_proj": 0}, {"q_proj": "4"}, {"(": 4}],
    "alpha_pattern": [{"q_proj": -1}, {"[": 4}, {"q_proj": float("nan")}],
    "target_modules": [3, [3], "("],
    "exclude_modules": [3, "*"],
    "layers_to_transform": [-1, "1", [0.5]],
    "layers_pattern": [3, [3]],
    "fan_in_fan_out": ["yes", 1],
    "trains": [1, "no"],
}
RECORD_ROWS = [
    Row("B10", f"{name}={value!r}", lambda b, n=name, v=value: edit_record(b.mixture, **{n: v}), (name,))
    for name, values in WRONG.items()
    for value in values
]


def same_names(one: str, other: str) -> Spoil:
    def spoil(bench: Bench) -> None:
        records = json.loads((bench.mixture / CONFIG).read_text())["experts"]
        edit(bench.mixture, experts=[records[0] | {"name": one}, records[1] | {"name": other}])

    return spoil


RECORD_ROWS += [
    Row("B12", "equal names", same_names("a", "a"), ("'a'", "2 times")),
    Row("B12", "equal but for case", same_names("math", "Math"), ("'math'", "'Math'", "case")),
    Row("B10", "an unknown field", lambda b: edit_record(b.mixture, flavour=1), ("flavour", "upgrade")),
    Row("B11", "reserved", lambda b: edit_record(b.mixture, name="null"), ("'null'", "reserved")),
    Row("B11", "reserved for the base", lambda b: edit_record(b.mixture, name="__base__"), ("reserved",)),
]


@parametrized(RECORD_ROWS)
def test_a_record_of_the_saved_config(row: Row, zoo: Zoo, tmp_path: Path) -> None:
    check_refused(row, Bench(zoo, tmp_path))


def test_every_field_of_a_record_has_a_row() -> None:
    assert set(WRONG) == {field.name for field in dataclasses.fields(ExpertSpec)}


# -- the weights as a file ---------------------------------------------------------------------------


def weights(change: Callable[[bytes], bytes]) -> Spoil:
    return lambda bench: edit_bytes(bench.mixture / WEIGHTS, change)


def tensors(change: Callable[[dict[str, Tensor]], object], folder: str = "mixture") -> Spoil:
    return lambda bench: edit_tensors(getattr(bench, folder), change)


def some(found: dict[str, Tensor], part: str) -> str:
    return next(key for key in sorted(found) if part in key)


def lose(part: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda found: found.pop(some(found, part))


def poison(part: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(found: dict[str, Tensor]) -> None:
        found[some(found, part)].view(-1)[-1] = value

    return change


def turn_a_bit(part: str) -> Callable[[dict[str, Tensor]], None]:
    def change(found: dict[str, Tensor]) -> None:
        found[some(found, part)].view(-1)[:1].view(torch.int32)[0] ^= 1

    return change


def taller(found: dict[str, Tensor]) -> None:
    key = some(found, "molora_A")
    found[key] = torch.cat([found[key], found[key][:1]])


def wider(found: dict[str, Tensor]) -> None:
    key = some(found, "molora_A")
    found[key] = torch.cat([found[key], found[key][:, :1]], dim=1)


def pickle_only(bench: Bench) -> None:
    (bench.mixture / WEIGHTS).rename(bench.mixture / "adapter_model.bin")


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda d: b"",
    "cut by one byte": lambda d: d[:-1],
    "cut in half": lambda d: d[: len(d) // 2],
    "a byte too many": lambda d: d + b"x",
    "header of 2**60": lambda d: struct.pack("<Q", 2**60) + d[8:],
    "header no JSON": lambda d: d[:8] + b"x" * len(d[8:]),
    "a pickle in its place": lambda d: b"\x80\x04K\x01." * 9,
}
WEIGHT_ROWS = [
    Row("C1", f"{name} ({act.__name__})", weights(change), (WEIGHTS, "safetensors", "copy the folder"), act)
    for name, change in BROKEN.items()
    for act in (load, load_second)
] + [
    Row("C2", "a pickle alone", pickle_only, (f"no {WEIGHTS}", "run code", "safetensors"), load_safely),
    Row(
        "B14", "no weights", lambda b: (b.mixture / WEIGHTS).unlink(), (f"no {WEIGHTS}", "save"), load_safely
    ),
    Row("A26", "more ranks than experts", tensors(taller), (WEIGHTS, "rows", "not from one save")),
    Row("A26", "another rank in the config", lambda b: edit_record(b.mixture, r=5), ("rows", "ranks")),
    Row("A24", "a wider matrix", tensors(wider), ("could not be loaded", "load it on the base"), load_safely),
]
# Refused when it has arrived; what was injected for it is taken out again.
ARRIVED = {
    "a lost router": ("A6", lose("molora_router"), "missing from the file"),
    "a lost A": ("A6", lose("molora_A"), "missing from the file"),
    "a lost B": ("A6", lose("molora_B"), "missing from the file"),
    "a tensor of another layer": (
        "A5",
        lambda t: t.update({some(t, "molora_A").replace("layers.0", "layers.7"): t[some(t, "molora_A")] + 0}),
        "no place for",
    ),
    "NaN in an expert": ("A21", poison("molora_A", float("nan")), "NaN"),
    "infinity in an expert": ("A21", poison("molora_B", float("inf")), "infinity"),
    "NaN in a router": ("A21", poison("molora_router", float("nan")), "NaN"),
    "a bit of an expert": ("A27", turn_a_bit("molora_B"), "are not those that its config describes"),
    "a bit of a router": ("A27", turn_a_bit("molora_router"), "routers are not those that were saved"),
}
WEIGHT_ROWS += [
    Row(fault if act is not load_second else "C4", f"{name} ({act.__name__})", tensors(change), (words,), act)
    for name, (fault, change, words) in ARRIVED.items()
    for act in (load, load_safely, load_second)
] + [
    Row(
        "A27",
        f"a bit of {part} that trains",
        tensors(turn_a_bit(part), "learning"),
        ("routers or experts are not those that were saved",),
        load_learning,
    )
    for part in ("molora_A", "molora_B", "molora_router")
]
WEIGHT_ROWS += [
    Row("B12", f"over a mixture: {name}", tensors(change), (words,), load_over)
    for name, (change, words) in {
        "another expert": (turn_a_bit("molora_A"), "choose another adapter_name"),
        "NaN in an expert": (poison("molora_B", float("nan")), "holds NaN"),
        "NaN in a router": (poison("molora_router", float("nan")), "holds NaN"),
    }.items()
]


@parametrized(WEIGHT_ROWS)
def test_the_weights_as_a_file(row: Row, zoo: Zoo, tmp_path: Path) -> None:
    check_refused(row, Bench(zoo, tmp_path))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_refused_load_leaves_the_base_ready_for_a_good_one(
    low_cpu_mem_usage: bool, zoo: Zoo, tmp_path: Path
) -> None:
    bench, good = Bench(zoo, tmp_path / "bad"), Bench(zoo, tmp_path / "good")
    bench.fields = {"low_cpu_mem_usage": low_cpu_mem_usage}
    tensors(turn_a_bit("molora_router"))(bench)
    check_refused(Row("C4", "", lambda b: None, ()), bench)
    again = PeftModel.from_pretrained(bench.base, str(good.mixture)).eval()
    assert torch.equal(logits_of(again, BATCH), logits_of(load(good).eval(), BATCH))


def test_files_of_two_saves_are_noticed(zoo: Zoo, tmp_path: Path) -> None:
    """What a crash between PEFT's two files leaves: new weights, old config."""
    old, new = Bench(zoo, tmp_path / "old"), Bench(zoo, tmp_path / "new")
    model = load(new)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "molora_router" in name:
                parameter.add_(1)
    model.save_pretrained(str(new.mixture))
    (old.mixture / WEIGHTS).write_bytes((new.mixture / WEIGHTS).read_bytes())
    check_refused(Row("C6", "two saves", lambda b: None, ("are not from one save",)), old)


def test_a_config_saved_alone_says_nothing_of_weights(zoo: Zoo, tmp_path: Path) -> None:
    """Into a folder with older weights, as transformers does before it writes new ones."""
    bench = Bench(zoo, tmp_path)
    MoLoraConfig.from_pretrained(str(bench.mixture)).save_pretrained(str(tmp_path / "alone"))
    config = MoLoraConfig.from_pretrained(str(bench.mixture))
    assert config.weights_digest is not None
    assert load(bench).peft_config["default"].weights_digest is None
    load(bench := Bench(zoo, tmp_path / "again")).peft_config["default"].save_pretrained(str(bench.mixture))
    assert MoLoraConfig.from_pretrained(str(bench.mixture)).weights_digest is None


def test_verify_experts_leaves_the_comparison_out(zoo: Zoo, tmp_path: Path) -> None:
    bench = Bench(zoo, tmp_path)
    tensors(turn_a_bit("molora_router"))(bench)
    load_mixture(bench.base, bench.mixture, verify_experts=False)


def test_a_checkpoint_of_the_same_run_loads_over_its_mixture(zoo: Zoo, tmp_path: Path) -> None:
    """A trainer that resumes loads over the name; other routers are then no damage."""
    start, later = Bench(zoo, tmp_path / "start"), Bench(zoo, tmp_path / "later")
    edit_tensors(later.mixture, turn_a_bit("molora_router"))
    model = PeftModel.from_pretrained(start.base, str(start.mixture), is_trainable=True)
    model.load_adapter(str(later.mixture), "default", is_trainable=True)
    found = {k: v for k, v in model.state_dict().items() if "molora_router" in k}
    wanted = load_file(later.mixture / WEIGHTS)
    assert found
    for name, value in found.items():
        assert torch.equal(value, wanted[name.replace(".default", "")])


# -- what travels, and what a config may not do ------------------------------------------------------


def test_a_mixture_needs_none_of_the_adapters_it_was_made_from(zoo: Zoo, tmp_path: Path) -> None:
    """B15: their folders may be moved, or gone."""
    bench = Bench(zoo, tmp_path)
    expected = logits_of(load(bench).eval(), BATCH)
    edit(
        bench.mixture,
        experts=[
            r | {"source": "/gone"} for r in json.loads((bench.mixture / CONFIG).read_text())["experts"]
        ],
    )
    assert torch.equal(logits_of(load_safely(Bench(zoo, tmp_path)).eval(), BATCH), expected)


def test_nothing_that_a_config_names_is_imported(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D1: neither of a mixture nor of an adapter, and nothing that it names as its base is fetched (D2)."""
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    named = {"base_model_class": "LlamaForCausalLM", "parent_library": "trap"}
    bench = Bench(zoo, tmp_path / "bench")
    edit(bench.mixture, auto_mapping=named, base_model_name_or_path="org/trap")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(bench)
        load_safely(Bench(zoo, tmp_path / "bench"))
    assert not (tmp_path / "sprung").exists()
