"""From a file to a mixture: two adapters and a full model of one base, inspected, mixed, loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.models import load_base, save_adapter, save_base, save_full
from typer.testing import CliRunner

import peft_moe
from peft_moe.cli import main as cli
from peft_moe.experts.extraction.extract import extract_adapter
from peft_moe.mixfile import build_mixture, inspect_file
from peft_moe.mixfile.inspect import inspect_paths

SUMS, POEMS, CODE = (
    ["12 + 30 =", "7 + 5 =", "add 4 to 9"],
    ["a rose is a rose", "o wild west wind"],
    ["def f(x):", "if x:"],
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A base, adapters "sums" and "poems", and the full model "code"."""
    folder = tmp_path_factory.mktemp("mix")
    base = save_base(folder / "base")
    save_adapter(base, folder / "sums", 1)
    save_adapter(base, folder / "poems", 2, r=2, target_modules=["v_proj", "up_proj"])
    save_full(base, folder / "code", 3, r=5, target_modules=["q_proj", "o_proj", "gate_proj"])
    return folder


MERGEKIT = {
    "base_model": "base",
    "gate_mode": "hidden",
    "experts": [
        {"source_model": "sums", "positive_prompts": SUMS, "negative_prompts": POEMS},
        {"source_model": "poems", "positive_prompts": POEMS},
        {"source_model": "code", "positive_prompts": CODE},
    ],
}


def write(place: Path, values: dict, name: str = "mix.yaml") -> Path:
    (place / name).write_text(json.dumps(values))  # JSON is YAML
    return place / name


def run(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, [str(word) for word in words])
    return done.exit_code, done.output


def logits(model, text: str = "7 + 5 =") -> torch.Tensor:
    from support.models import tokenizer

    with torch.no_grad():
        return model(input_ids=torch.tensor([tokenizer()(text)["input_ids"]])).logits


def test_a_dense_expert_in_networks_mixed_at_their_output(place, tmp_path):
    """ "code" keeps all that it changed; one-hot gates are the full model."""
    entries = [{"source_model": "sums"}, {"source_model": "code", "keep": "dense"}]
    values = {"base_model": "base", "router": "linear", "mixing": "block", "top_k": 2, "null_expert": True}
    path = write(place, {**values, "experts": entries}, "dense.yaml")
    code, said = run("inspect", path)
    assert code == 0, said
    assert "dense, all of each layer" in said
    code, said = run("mix", path, "--out", tmp_path / "mix")
    assert code == 0, said
    model = PeftModel.from_pretrained(load_base(str(place / "base")), str(tmp_path / "mix")).eval()
    assert model.peft_config["default"].mixing == "block"
    for gates, single in (([[0.0, 1.0]], "code"), ([[0.0, 0.0]], "base")):
        with peft_moe.routing_inputs(gates=torch.tensor(gates)):
            # Base and change are added in another order than in the model's weights.
            torch.testing.assert_close(
                logits(model), logits(load_base(str(place / single))), atol=2e-5, rtol=2e-5
            )


def test_the_whole_path(place, tmp_path):
    path = write(place, MERGEKIT)
    code, said = run("inspect", path)
    assert code == 0, said
    assert not (place / "mix.extracted").exists()  # nothing was done yet
    code, said = run("mix", path, "--out", tmp_path / "mix")
    assert code == 0, said
    assert "Saved:" in said
    model = PeftModel.from_pretrained(load_base(str(place / "base")), str(tmp_path / "mix")).eval()
    config = model.peft_config["default"]
    assert config.expert_names == ["sums", "poems", "code"]
    assert config.base_model_name_or_path == str(place / "base")
    assert [record["source"] for record in config.experts] == [str(place / n) for n in config.expert_names]
    alone = {
        name: PeftModel.from_pretrained(load_base(str(place / "base")), str(place / name)).eval()
        for name in ("sums", "poems")
    }
    alone["code"] = load_base(str(place / "code"))
    for column, (name, single) in enumerate(alone.items()):
        gates = torch.zeros(1, 3)
        gates[0, column] = 1.0
        with peft_moe.routing_inputs(gates=gates):
            # The full model passed a decomposition; its factors are float32, as it is.
            torch.testing.assert_close(logits(model), logits(single), atol=2e-4, rtol=2e-4, msg=name)
    # The router was made from the prompts: each text goes to its own expert in most blocks.
    for column, texts in enumerate((SUMS, POEMS, CODE)):
        with peft_moe.record_routing() as record:
            logits(model, texts[0])
        votes = [
            routing.gates.argmax(-1).flatten().mode().values.item() for routing in record.decisions.values()
        ]
        assert votes.count(column) > len(votes) / 2


def test_the_same_file_gives_the_same_bytes(place, tmp_path):
    path = write(place, MERGEKIT, "twice.yaml")
    first = build_mixture(path, tmp_path / "one", progress=False)
    second = build_mixture(path, tmp_path / "two", progress=False)
    assert set(first.extracted) == {"code"}
    assert second.extracted == {}  # kept beside the file, used again
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert files == ["README.md", "adapter_config.json", "adapter_model.safetensors", "mix.yaml"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    other = build_mixture(
        write(place, {**MERGEKIT, "extract": {"rank": 2}}, "twice.yaml"), tmp_path / "three", progress=False
    )
    assert set(other.extracted) == {"code"}  # other settings, another adapter


def test_labels_instead_of_prompts(place, tmp_path):
    for name, texts in (("sums", SUMS), ("poems", POEMS)):
        rows = [json.dumps({"prompt": text, "completion": "x"}) for text in texts]
        (place / f"{name}.jsonl").write_text("\n".join(rows))
    values = {
        "base_model": "base",
        "experts": {"sums": "sums", "poems": "poems"},
        "router": "ridge",
        "null_expert": False,
        "fit": {"data": {"sums": "sums.jsonl", "poems": "poems.jsonl"}},
    }
    report = build_mixture(write(place, values, "labels.yaml"), tmp_path / "mix", progress=False)
    assert report.fit.method == "ridge"
    assert report.fit.per_column == {"sums": 3, "poems": 2}
    assert report.fit.training_accuracy == 1.0


def test_without_a_fit(place, tmp_path):
    values = {"base_model": "base", "experts": ["sums", "code"], "gate_mode": "random", "seed": 3}
    report = build_mixture(write(place, values, "random.yaml"), tmp_path / "mix", progress=False)
    assert report.fit is None
    tensors = load_file(tmp_path / "mix" / "adapter_model.safetensors")
    routers = torch.cat(
        [v.flatten() for k, v in tensors.items() if "molora_router" in k and k.endswith("weight")]
    )
    assert 0.01 < routers.std() < 0.03  # of router_init_std = 0.02
    other = build_mixture(write(place, {**values, "seed": 4}, "random.yaml"), tmp_path / "b", progress=False)
    again = load_file(other.out / "adapter_model.safetensors")
    assert any(not torch.equal(tensors[k], again[k]) for k in tensors if "molora_router" in k)


def test_what_is_announced_is_what_happens(place, tmp_path):
    path = write(place, MERGEKIT, "announced.yaml")
    facts = inspect_file(path).report.facts
    build_mixture(path, tmp_path / "mix", progress=False)
    tensors = load_file(tmp_path / "mix" / "adapter_model.safetensors")
    routers = sum(v.numel() for k, v in tensors.items() if "molora_router" in k)
    experts = sum(v.numel() for k, v in tensors.items() if ".molora_A" in k or ".molora_B" in k)
    assert facts["router's numbers"] == routers
    assert facts["trains"] == routers
    assert 0 < experts <= facts["experts' numbers, at most"]
    (mixture,) = inspect_paths([str(tmp_path / "mix")])
    assert mixture.kind == "mixture"
    assert mixture.facts["router's numbers"] == routers == mixture.facts["trains"]
    assert mixture.facts["experts' numbers"] == experts


def test_inspection_reads_no_weight(place, monkeypatch):
    from peft_moe.experts import adapter as adapters
    from peft_moe.io import checkpoint

    def refuse(*args, **kwargs):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(checkpoint.Checkpoint, "mapped", refuse)
    monkeypatch.setattr(adapters.ExpertFile, "_tensor", refuse)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", refuse)
    flight = inspect_file(write(place, MERGEKIT, "dry.yaml"))
    assert flight.report.all_problems == []
    parts = {part.name: part.facts for part in flight.report.parts}
    assert parts["sums"]["ranks"] == {"4": 6}
    assert parts["poems"]["targets"] == ["up_proj", "v_proj"]
    assert parts["code"]["layers"] == 14


def test_inspect_each_kind(place, capsys):
    code, said = run("inspect", place / "sums", place / "code", "--base", place / "base", "--json")
    assert code == 0, said
    adapter, model = json.loads(said)
    assert (adapter["kind"], model["kind"]) == ("adapter", "model")
    assert adapter["facts"]["modules"] == 6
    assert model["facts"]["rank by"] == "Gavish-Donoho, at most 64"
    alone = json.loads(run("inspect", place / "sums", "--json")[1])
    assert "pass --base" in alone[0]["notes"][0]
    _, table = run("inspect", place / "sums")
    assert re.search(r"ranks.*4 6", table)


def _damaged(place, tmp_path, name, change):
    import shutil

    folder = tmp_path / name
    shutil.copytree(place / name, folder)
    change(folder)
    return str(folder)


def _cut_pair(folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(key for key in tensors if "lora_B" in key))
    save_file(tensors, path)


def _dora(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))


def _other_base(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "org/other"}))


def _lost(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("expert", "change", "message"),
    [
        ("sums", _cut_pair, r"lacks .*lora_B"),
        ("sums", _dora, r"use_dora=True"),
        ("sums", _other_base, r"base_model_name_or_path='org/other', but the base is"),
        ("code", _lost, r"only pytorch_model.bin"),
    ],
)
def test_problems_end_with_code_2_and_nothing_is_written(expert, change, message, place, tmp_path):
    values = {
        "base_model": "base",
        "experts": {"poems": "poems", "bad": _damaged(place, tmp_path, expert, change)},
    }
    path = write(place, values, "bad.yaml")
    code, said = run("inspect", path, "--json")
    assert code == 2
    (found,) = json.loads(said)
    assert not found["ok"]
    problems = [problem for part in found["parts"] for problem in part["problems"]]
    assert len(problems) == 1
    assert re.search(message, problems[0])
    with pytest.raises(peft_moe.PeftMoeError, match=message):
        build_mixture(path, tmp_path / "mix", progress=False)
    assert not (tmp_path / "mix").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"router": "contxt"}, r"router='contxt' is not known"),
        ({"top_k": 5}, r"top_k=5 exceeds"),
        ({"experts": {"q_proj": "sums"}}, r"'q_proj' is part of the base's module paths"),
        ({"experts": {"null": "sums"}}, r"the name 'null' is reserved"),
        ({"experts": {"x": "nowhere/to/be/found"}}, r"there is no folder"),
        ({"base_model": "sums"}, r"it is an adapter already"),
    ],
)
def test_what_the_config_and_the_base_refuse(values, message, place):
    path = write(
        place, {"base_model": "base", "experts": {"sums": "sums", "poems": "poems"}, **values}, "no.yaml"
    )
    problems = inspect_file(path).report.all_problems
    assert len(problems) == 1
    assert re.search(message, problems[0])


def test_a_mixture_is_no_expert(place, tmp_path):
    path = write(
        place, {"base_model": "base", "experts": ["sums", "poems"], "router": "uniform"}, "inner.yaml"
    )
    build_mixture(path, tmp_path / "inner", progress=False)
    outer = write(place, {"base_model": "base", "experts": {"x": str(tmp_path / "inner")}}, "outer.yaml")
    assert "is a mixture" in inspect_file(outer).report.all_problems[0]


def test_extract_command(place, tmp_path):
    code, said = run(
        "extract", "--base", place / "base", "--model", place / "code", "--out", tmp_path / "a", "--json"
    )
    assert code == 0, said
    assert {layer["rank"] for layer in json.loads(said)["layers"]} == {0, 5}
    (tmp_path / "texts.jsonl").write_text('{"text": "12 + 30 = 42"}\n')
    code, said = run(
        "extract", "--base", place / "base", "--model", place / "code", "--out", tmp_path / "b", "--rank", 2,
        "--target-modules", "q_proj,o_proj", "--calibration", tmp_path / "texts.jsonl",
    )  # fmt: skip
    assert code == 0, said
    assert "nats per token" in said
    assert "not in the adapter: 10 × linear" in said
    same = extract_adapter(place / "base", place / "code", tmp_path / "c", progress=False)
    assert {layer.rank for layer in same.layers} == {0, 5}
    assert (tmp_path / "a" / "extraction.json").read_bytes() == (
        tmp_path / "c" / "extraction.json"
    ).read_bytes()
