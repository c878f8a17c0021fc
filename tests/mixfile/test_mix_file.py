"""Mix files: mergekit-moe's words and ours, and what is refused before any file that they name is opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_moe import PeftMoeError
from peft_moe.mixfile import read_mix_file

MERGEKIT = """
base_model: base
gate_mode: hidden
dtype: bfloat16
experts_per_token: 1
experts:
  - source_model: one
    positive_prompts: ["sum 1 and 2"]
    negative_prompts: ["write a poem"]
  - source_model: org/two.5-model
    positive_prompts: ["write a poem"]
"""
PLAIN = {"base_model": "base", "experts": {"a": "one", "b": "two"}}


def read(values, tmp_path):
    """From text, or from values on top of a sound file."""
    for name in ("base", "one", "two"):
        (tmp_path / name).mkdir(exist_ok=True)
    text = values if isinstance(values, str) else json.dumps({**PLAIN, **values})
    (tmp_path / "mix.yaml").write_text(text)
    return read_mix_file(tmp_path / "mix.yaml")


def test_the_shape_of_mergekit(tmp_path):
    file = read(MERGEKIT, tmp_path)
    assert file.base == str(tmp_path / "base")
    assert [(e.name, e.source) for e in file.experts] == [
        ("one", str(tmp_path / "one")),
        ("two-5-model", "org/two.5-model"),  # on the Hub; a dot cannot stand in a name
    ]
    assert file.fields == {"router": "hidden", "top_k": 1}
    assert file.fit == {}
    assert file.prompts == {
        "one": {"positive": ["sum 1 and 2"], "negative": ["write a poem"]},
        "two-5-model": {"positive": ["write a poem"], "negative": []},
    }
    assert file.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("mode", "fields"),
    [
        ("hidden", {"router": "hidden"}),
        ("cheap_embed", {"router": "cheap_embed"}),
        ("random", {"router": "mixtral", "router_init_std": 0.02}),
    ],
)
def test_gate_modes(mode, fields, tmp_path):
    prompts = {} if mode == "random" else {"positive_prompts": ["x"]}
    other = {} if mode == "random" else {"positive_prompts": ["y"]}
    experts = [{"source_model": "one", **prompts}, {"source_model": "two", **other}]
    file = read({"gate_mode": mode, "experts": experts}, tmp_path)
    assert file.fields == fields
    config = file.config({e.name: e.source for e in file.experts})
    assert config.router == fields["router"]
    assert (file.fit is None) == (mode == "random")


def test_prompts_alone_mean_hidden_as_in_mergekit(tmp_path):
    experts = {n: {"source_model": s, "positive_prompts": [n]} for n, s in PLAIN["experts"].items()}
    assert read({"experts": experts}, tmp_path).fields == {"router": "hidden"}


def test_all_experts_per_token_is_a_dense_gate(tmp_path):
    experts = {n: {"source_model": s, "positive_prompts": [n]} for n, s in PLAIN["experts"].items()}
    file = read({"gate_mode": "hidden", "experts_per_token": 2, "experts": experts}, tmp_path)
    assert file.config({"a": "one", "b": "two"}).straight_through is False


def test_shared_experts_in_both_forms(tmp_path):
    ours = read({"shared_experts": ["b"]}, tmp_path)
    theirs = read(
        {"experts": {"a": "one"}, "shared_experts": [{"source_model": "two", "name": "b"}]}, tmp_path
    )
    for file in (ours, theirs):
        assert [e.name for e in file.experts] == ["a", "b"]
        assert file.fields["shared_experts"] == ["b"]


def test_our_own_words(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    file = read(
        {
            "router": "ridge", "null_expert": True, "seed": 7, "extract": {"max_rank": 8, "rank": 3},
            "fit": {"data": {"a": "a.jsonl"}, "inputs": "base"},
            "experts": {"a": "one", "b": {"source_model": "two", "extract": {"energy": 0.9}}},
        },
        tmp_path,
    )  # fmt: skip
    assert file.fields == {"router": "ridge", "null_expert": True}
    assert file.fit == {"data": {"a": str(tmp_path / "a.jsonl")}, "inputs": "base"}
    assert [e.extract for e in file.experts] == [{"max_rank": 8, "rank": 3}, {"max_rank": 8, "energy": 0.9}]
    assert file.seed == 7


def test_an_adapter_written_with_its_base(tmp_path):
    file = read({"experts": [{"source_model": "base+one"}]}, tmp_path)
    assert file.experts[0].source == str(tmp_path / "one")
    with pytest.raises(PeftMoeError, match=r"the adapter's base 'two' is not base_model"):
        read({"experts": [{"source_model": "two+one"}]}, tmp_path)


SAME = [{"source_model": name, "positive_prompts": ["z"]} for name in ("one", "two")]
DESCRIBED = [
    {"source_model": "one", "positive_prompts": ["x"]},
    {"source_model": "two", "positive_prompts": ["y"]},
]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base_modell": "x"}, r"'base_modell' is not known. Did you mean 'base_model'"),
        ({"rooter": "x"}, r"'rooter' is not known. Did you mean 'router'"),
        ({"base_model": None}, r"names no base_model"),
        ({"experts": {}}, r"must name one or more experts"),
        ({"experts": "one"}, r"must name one or more experts"),
        ({"experts": [{"positive_prompts": ["x"]}]}, r"names no source_model"),
        ({"experts": [{"source_model": 3}]}, r"source_model=3 must be text"),
        ({"experts": [{"source_model": "one", "weight": 2}]}, r"experts\[0\]: 'weight' is not known"),
        ({"experts": ["one", "one"]}, r"two experts are called 'one'"),
        ({"experts": {"a": "one", "A": "two"}}, r"two experts are called 'A'"),
        ({"experts": {"a": {"source_model": "one", "name": "b"}}}, r"is named 'b' as well"),
        ({"experts": [{"source_model": "one", "positive_prompts": "x"}]}, r"must be a list of texts"),
        ({"experts": [{"source_model": "one", "negative_prompts": ["x"]}]}, r"has negative_prompts only"),
        ({"experts": [{"source_model": "one", "noise_scale": 0.1}]}, r"noise_scale: 0.1 is not"),
        ({"experts": [{"source_model": "one", "residual_scale": 0.1}]}, r"residual_scale: 0.1 is not"),
        ({"experts": [{"source_model": "one", "keep": "danse"}]}, r"'danse' is not known. Did you mean"),
        ({"architecture": "qwen"}, r"architecture: 'qwen' is not possible: a native checkpoint"),
        ({"gate_mode": "hiden", "experts": DESCRIBED}, r"'hiden' is not known. Did you mean 'hidden'"),
        ({"gate_mode": "hidden"}, r"positive_prompts are missing for \['a', 'b'\]"),
        ({"gate_mode": "hidden", "router": "linear"}, r"gate_mode='hidden' and router='linear' both choose"),
        ({"gate_mode": "random", "experts": DESCRIBED}, r"gate_mode='random' reads no prompts"),
        ({"gate_mode": "hidden", "experts": SAME}, r"same prompts"),
        ({"router": "uniform", "experts": DESCRIBED}, r"router='uniform' cannot be made from prompts"),
        ({"experts_per_token": 3}, r"experts_per_token=3 must be a whole number from 1 to the 2 experts"),
        ({"experts_per_token": True}, r"experts_per_token=True"),
        ({"experts_per_token": 1, "top_k": 1}, r"are one thing"),
        ({"shared_experts": [{"source_model": "x", "positive_prompts": ["x"]}]}, r"is always on"),
        ({"dtype": "bf16"}, r"dtype='bf16' is not known. Did you mean"),
        ({"seed": -1}, r"seed=-1 must be"),
        ({"extract": {"rnk": 3}}, r"extract: 'rnk' is not known. Did you mean 'rank'"),
        ({"extract": {"dtype": "int8"}}, r"extract.dtype='int8' is not known"),
        ({"fit": {}}, r"fit has no data"),
        ({"fit": {"data": "lost.jsonl"}}, r"there is no file 'lost.jsonl'"),
        ({"fit": {"data": "x", "stepps": 3}}, r"'stepps' is not known. Did you mean 'steps'"),
        ({"fit": {"data": "x"}, "experts": DESCRIBED}, r"keep one of the two"),
    ],
)  # fmt: skip
def test_refusals(values, message, tmp_path):
    with pytest.raises(PeftMoeError, match=message):
        read(values, tmp_path)


@pytest.mark.parametrize(
    "key",
    [
        "format_version",
        "base_precision",
        "base_fingerprint",
        "weights_digest",
        "peft_type",
        "inference_mode",
    ],
)
def test_what_injection_fills_is_no_key(key, tmp_path):
    with pytest.raises(PeftMoeError, match=f"'{key}' is not known"):
        read({key: 1}, tmp_path)


def test_values_that_change_nothing_are_accepted(tmp_path):
    experts = [{"source_model": "one", "noise_scale": 0.0, "residual_scale": None, "keep": "low_rank"}]
    assert read({"experts": experts, "mixing": "linear", "architecture": None}, tmp_path).experts


def test_dense_experts_and_ranks_are_one_choice(tmp_path):
    experts = [{"source_model": "one", "keep": "dense"}, {"source_model": "two", "extract": {"rank": 2}}]
    found = read({"experts": experts, "extract": {"max_rank": 8}, "mixing": "block"}, tmp_path)
    assert [entry.extract for entry in found.experts] == [{"dense": True}, {"max_rank": 8, "rank": 2}]
    assert found.fields["mixing"] == "block"


def test_paths_start_from_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(Path("/"))
    assert read({}, tmp_path).experts[0].source == str(tmp_path / "one")
