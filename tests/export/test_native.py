"""Native exports: a block mixture as Mixtral, Qwen2-MoE or Qwen3-MoE, loaded by transformers alone."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from support.adapters import Recipe
from support.batches import logits_of
from support.training import samples, tokenizer
from support.zoo import Zoo
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from peft_moe import PeftMoeError
from peft_moe.cli.main import app
from peft_moe.export import export
from peft_moe.io.shards import Piece, read_size, write_shards

# float32 against float32 along another order of summation, as in the table of equalities.
FP32 = {"atol": 1e-5, "rtol": 1e-5}
MOVED = 1e-1
CLASSES = {
    "llama": "MixtralForCausalLM",
    "mistral": "MixtralForCausalLM",
    "qwen2": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3MoeForCausalLM",
}
# Ranks, scales and layers differ.
RECIPES = {
    "a": Recipe("mlp", 11, {"r": 4, "lora_alpha": 8}),
    "b": Recipe("mlp", 12, {"r": 3, "lora_alpha": 4, "use_rslora": True, "rank_pattern": {"up_proj": 5}}),
    "c": Recipe("mlp", 13, {"r": 6, "lora_alpha": 3, "layers_to_transform": [1, 2]}),
}
ROUTED: dict[str, dict[str, Any]] = {
    "top-2": {"router": "gate", "top_k": 2},
    "dense": {"router": "gate"},
    "dense, not divided": {"router": "gate", "norm_topk_prob": False},
    "top-1, sharp": {"router": "gate", "top_k": 1, "router_temperature": 0.5},
    "null expert": {"router": "gate", "top_k": 2, "null_expert": True},
    "uniform": {"router": "uniform"},
}
# What only Qwen2-MoE's shared expert can hold.
APART: dict[str, dict[str, Any]] = {
    "shared": {"router": "gate", "top_k": 1, "shared_experts": ["b"]},
    "two shared": {"router": "gate", "shared_experts": ["a", "c"], "null_expert": True},
    "switch": {"router": "gate", "top_k": 1, "norm_topk_prob": False},
    "two of four, not divided": {"router": "gate", "top_k": 2, "norm_topk_prob": False, "null_expert": True},
    "scaled": {"router": "gate", "top_k": 2, "routed_scaling_factor": 0.6, "shared_experts": ["a"]},
}
IDS = torch.randint(3, 48, (2, 14), generator=torch.Generator().manual_seed(0))


def experts(zoo: Zoo, name: str, recipes: dict[str, Recipe] = RECIPES) -> dict[str, str]:
    return {key: zoo.adapter(name, f"ffn-{key}", recipe) for key, recipe in recipes.items()}


def mixed(zoo: Zoo, name: str, **fields: Any) -> PeftModel:
    given = {"experts": experts(zoo, name), "mixing": "block", "router": "gate", **fields}
    if not fields.keys() & {"top_k", "top_k_per_layer", "topk_method", "router"}:
        given["top_k"] = 2
    if given.get("top_k") == 1 and "norm_topk_prob" not in fields:
        given["straight_through"] = True
    return zoo.mixture(name, **given)


def saved(model: PeftModel, folder: Path) -> str:
    model.save_pretrained(str(folder))
    return str(folder)


def native(zoo: Zoo, name: str, model: PeftModel, place: Path, **options: Any) -> Any:
    options = {"to": "native", "base": zoo.saved_base(name), **options}
    report = export(saved(model, place / "mixture"), place / "out", **options)
    return AutoModelForCausalLM.from_pretrained(place / "out", dtype="auto").eval(), report


def same_logits(found: Any, model: PeftModel, zoo: Zoo, name: str) -> None:
    wanted = logits_of(model, {"input_ids": IDS})
    torch.testing.assert_close(logits_of(found, {"input_ids": IDS}), wanted, **FP32)
    assert (wanted - logits_of(zoo.base(name), {"input_ids": IDS})).abs().max() > MOVED


@pytest.mark.parametrize("routed", ROUTED)
@pytest.mark.parametrize("name", CLASSES)
def test_a_native_model_has_the_mixtures_logits(zoo: Zoo, name: str, routed: str, tmp_path: Path) -> None:
    model = mixed(zoo, name, **ROUTED[routed])
    found, report = native(zoo, name, model, tmp_path)
    assert type(found).__name__ == CLASSES[name]
    same_logits(found, model, zoo, name)
    assert report.measured is None
    if name == "qwen2":
        assert found.config.tie_word_embeddings


@pytest.mark.parametrize("routed", APART)
def test_what_is_always_on_is_qwen2_moes_shared_expert(zoo: Zoo, routed: str, tmp_path: Path) -> None:
    model = mixed(zoo, "qwen2", **APART[routed])
    found, _ = native(zoo, "qwen2", model, tmp_path)
    same_logits(found, model, zoo, "qwen2")
    for name in ("llama", "qwen3"):
        with pytest.raises(PeftMoeError, match=r"always on|leave to the base|the sum of the gates"):
            export(mixed(zoo, name, **APART[routed]), tmp_path / name, "native", base=zoo.saved_base(name))


@pytest.mark.parametrize("name", CLASSES)
def test_unmixed_layers_stay_as_they_are(zoo: Zoo, name: str, tmp_path: Path) -> None:
    upper = {key: Recipe("mlp", 20 + n, {"r": 3, "layers_to_transform": [1]}) for n, key in enumerate("xy")}
    model = mixed(
        zoo, name, experts={k: zoo.adapter(name, f"upper-{k}", r) for k, r in upper.items()}, top_k=1
    )
    found, report = native(zoo, name, model, tmp_path)
    same_logits(found, model, zoo, name)
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    if CLASSES[name] == "MixtralForCausalLM":
        assert any("are not mixed" in note for note in report.notes)
    else:
        assert found.config.mlp_only_layers == [0, 2]
        assert "model.layers.0.mlp.gate_proj.weight" in names
        assert "model.layers.1.mlp.gate_proj.weight" not in names


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_names_and_shapes_are_those_that_transformers_writes(zoo: Zoo, name: str, tmp_path: Path) -> None:
    found, _ = native(zoo, name, mixed(zoo, name), tmp_path)
    found.save_pretrained(str(tmp_path / "again"))
    ours, theirs = (load_file(tmp_path / place / "model.safetensors") for place in ("out", "again"))
    assert {k: t.shape for k, t in ours.items()} == {k: t.shape for k, t in theirs.items()}
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    # What the Hub's Mixtral and Qwen-MoE files hold, and what servers read.
    layer = "model.layers.1."
    classic = {
        "llama": ["block_sparse_moe.gate", *(f"block_sparse_moe.experts.2.w{n}" for n in (1, 2, 3))],
        "qwen2": [
            "mlp.gate",
            "mlp.experts.2.gate_proj",
            "mlp.shared_expert.up_proj",
            "mlp.shared_expert_gate",
        ],
        "qwen3": ["mlp.gate", "mlp.experts.2.gate_proj", "mlp.experts.2.down_proj"],
    }[name]
    assert {f"{layer}{key}.weight" for key in classic} <= set(ours)


@pytest.mark.parametrize("name", CLASSES)
def test_it_needs_nothing_of_ours_and_generates_the_same(zoo: Zoo, name: str, tmp_path: Path) -> None:
    model = mixed(zoo, name)
    native(zoo, name, model, tmp_path, max_shard_size="64KB")
    with torch.no_grad():
        text = model.generate(input_ids=IDS[:1], max_new_tokens=8, do_sample=False, eos_token_id=None)
    wanted = {"logits": logits_of(model, {"input_ids": IDS}), "text": text}
    torch.save(wanted, tmp_path / "wanted.pt")
    torch.save(IDS, tmp_path / "ids.pt")
    script = """if True:
        import sys, torch
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
        ids, wanted = (torch.load(path, weights_only=True) for path in sys.argv[2:4])
        with torch.no_grad():
            found = model(input_ids=ids).logits
            text = model.generate(input_ids=ids[:1], max_new_tokens=8, do_sample=False, eos_token_id=None)
        torch.testing.assert_close(found, wanted["logits"], atol=1e-5, rtol=1e-5)
        assert torch.equal(text, wanted["text"])
        assert not any(name.split(".")[0] in ("peft_moe", "peft") for name in sys.modules)
        print("same")
    """
    words = [str(tmp_path / part) for part in ("out", "ids.pt", "wanted.pt")]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "same"


def test_what_servers_do_otherwise_is_said(zoo: Zoo, tmp_path: Path) -> None:
    _, report = native(zoo, "qwen2", mixed(zoo, "qwen2"), tmp_path / "sparse")
    assert sum(note.startswith("Servers: ") for note in report.notes) == 2  # divided weights, tied embeddings
    gate = load_file(tmp_path / "sparse" / "out" / "model.safetensors")
    # llama.cpp makes a sigmoid of silu(s)/s, which is NaN at 0.
    assert bool((gate["model.layers.0.mlp.shared_expert_gate.weight"] > 0).all())
    half = native(zoo, "qwen2", mixed(zoo, "qwen2"), tmp_path / "half", dtype="float16")[0]
    assert all(bool((layer.mlp.shared_expert_gate.weight > 0).all()) for layer in half.model.layers)
    _, report = native(zoo, "llama", mixed(zoo, "llama"), tmp_path / "llama")
    assert not any(note.startswith("Servers: ") for note in report.notes)


def test_dense_experts(zoo: Zoo, tmp_path: Path) -> None:
    # Of full rank, as those that come from whole models: ΔW on one side, an identity on the other.
    rank = {"r": 64, "lora_alpha": 64}
    dense = {key: Recipe("mlp", 30 + n, rank) for n, key in enumerate("de")}
    folders = {key: Path(zoo.adapter("llama", f"full-{key}", recipe)) for key, recipe in dense.items()}
    model = mixed(zoo, "llama", experts={key: str(path) for key, path in folders.items()}, top_k=1)
    found, _ = native(zoo, "llama", model, tmp_path)
    same_logits(found, model, zoo, "llama")


@pytest.mark.parametrize("made", ["gate", "uniform"])
def test_a_router_trained_on_four_bits(zoo: Zoo, four_bit: Any, made: str, tmp_path: Path) -> None:
    base = four_bit()
    model = mixed(zoo, "llama", router=made, base=base)
    if made == "gate":
        weights = [p for n, p in model.named_parameters() if "molora_router" in n]
        assert weights
        before = [p.detach().clone() for p in weights]
        optimizer = torch.optim.Adam(weights, lr=0.05)
        model.train()
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
        assert all(not torch.equal(p, old) for p, old in zip(weights, before, strict=True))
        model.eval()
    folder = saved(model, tmp_path / "mixture")
    report = export(folder, tmp_path / "out", "native", base=zoo.saved_base("llama"))
    assert any("bitsandbytes nf4" in note for note in report.notes)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    whole = PeftModel.from_pretrained(zoo.base("llama"), folder).eval()
    same_logits(found, whole, zoo, "llama")
    # The mixture in memory, on four bits, is what a measurement compares with.
    live = export(model, tmp_path / "live", "native", base=zoo.saved_base("llama"), data=IDS)
    apart = logits_of(found, {"input_ids": IDS[:1]}) - logits_of(model, {"input_ids": IDS[:1]})
    most = live.measured["held_out"]["native"]["max_logit_difference"]
    assert most == pytest.approx(float(apart[:, :-1].abs().max()), rel=1e-3)
    assert most > MOVED


BIASED = {"router": "linear", "top_k": 2}
NEAR: dict[str, tuple[dict[str, Any], str]] = {
    "bias": (BIASED, "bias per expert"),
    "mlp": ({"router": "mlp", "top_k": 2}, "no linear map"),
    "sigmoid": ({"router": "gate", "top_k": 2, "scoring_func": "sigmoid"}, "no softmax"),
    "input norm": ({"router": "gate", "top_k": 2, "router_input_norm": True}, "no linear map"),
    "per prompt": ({"router": "gate", "top_k": 2, "router_granularity": "sequence"}, "more than the token"),
    "model": (
        {"router": "gate", "top_k": 2, "router_scope": "model", "router_tap": 1},
        "once for all layers",
    ),
    "static": ({"router": "static"}, "constant gates are not equal"),
    "not divided": ({"router": "gate", "top_k": 1, "norm_topk_prob": False}, "leaves what the gates leave"),
}


@pytest.mark.parametrize("case", NEAR)
def test_what_is_near_is_refused_or_written_with_its_gap(zoo: Zoo, case: str, tmp_path: Path) -> None:
    fields, words = NEAR[case]
    model = mixed(zoo, "llama", **fields)
    base = zoo.saved_base("llama")
    folder = saved(model, tmp_path / "mixture")
    with pytest.raises(PeftMoeError, match=rf"{words}.*--approximate"):
        export(folder, tmp_path / "out", "native", base=base)
    assert not (tmp_path / "out").exists()
    texts = torch.randint(3, 48, (24, 24), generator=torch.Generator().manual_seed(1))
    report = export(folder, tmp_path / "out", "native", base=base, approximate=True, data=texts)
    row = report.measured["held_out"]["native"]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    # What is said is what is.
    apart = [
        logits_of(found, {"input_ids": t[None]}) - logits_of(model, {"input_ids": t[None]})
        for t in texts[::2]
    ]
    assert row["max_logit_difference"] == pytest.approx(
        max(float(d[:, :-1].abs().max()) for d in apart), rel=1e-3
    )
    assert row["kl"] > 0
    assert any(note.startswith("Approximated: ") for note in report.notes)
    assert json.loads((tmp_path / "out" / "export.json").read_text())["measured"]["held_out"]["native"] == row


def test_a_fitted_bias_is_nearer_than_none(zoo: Zoo, tmp_path: Path) -> None:
    model = mixed(zoo, "llama", **BIASED)
    texts = torch.randint(3, 48, (64, 24), generator=torch.Generator().manual_seed(2))
    options: dict[str, Any] = {"base": zoo.saved_base("llama"), "data": texts}
    fitted = export(model, tmp_path / "fitted", "native", approximate=True, **options)
    with torch.no_grad():
        biases = {n: p for n, p in model.named_parameters() if n.endswith("scorer.bias") or ".bias" in n}
        kept = {n: p.detach().clone() for n, p in biases.items() if "molora_router" in n}
        assert kept
        for n in kept:
            biases[n].zero_()
    dropped = AutoModelForCausalLM.from_pretrained(
        export(model, tmp_path / "dropped", "native", **options).out
    ).eval()
    with torch.no_grad():
        for n, value in kept.items():
            biases[n].copy_(value)

    def kl(found: Any) -> float:
        gaps = []
        for text in texts[::2]:
            one, other = (logits_of(m, {"input_ids": text[None]}).log_softmax(-1) for m in (model, found))
            gaps.append(float((one.exp() * (one - other))[:, :-1].sum(-1).mean()))
        return sum(gaps) / len(gaps)

    assert fitted.measured["held_out"]["native"]["kl"] < kl(dropped)


def test_experts_in_the_attention_are_merged_at_their_mean(zoo: Zoo, tmp_path: Path) -> None:
    model = zoo.mixture("llama", "uniform", mixing="block")
    base = zoo.saved_base("llama")
    with pytest.raises(PeftMoeError, match=r"12 adapted modules lie in no feed-forward network"):
        export(model, tmp_path / "out", "native", base=base)
    # Constant gates are their own mean, and a linear layer's mixture of them is its merge: nothing is lost.
    report = export(model, tmp_path / "out", "native", base=base, approximate=True, data=IDS)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    same_logits(found, model, zoo, "llama")
    assert report.measured["held_out"]["native"]["kl"] < 1e-6
    routed = mixed(zoo, "llama", experts=zoo.experts("llama"))
    report = export(routed, tmp_path / "routed", "native", base=base, approximate=True, data=IDS)
    assert report.measured["held_out"]["native"]["kl"] > 1e-6


def _config(base: Path, **changes: Any) -> None:
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("texts", [True, False], ids=["data", "built-in texts"])
def test_an_approximation_from_the_command_line(zoo: Zoo, texts: bool, tmp_path: Path) -> None:
    folder = saved(mixed(zoo, "llama", **BIASED), tmp_path / "mixture")
    tokenizer().save_pretrained(folder)
    words = ["export", folder, "--to", "native", "--base", zoo.saved_base("llama"), "--json"]
    words += ["--max-shard-size", "200KB"]
    refused = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "exact")])
    assert refused.exit_code != 0
    assert not (tmp_path / "exact").exists()
    rows = tmp_path / "texts.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in samples(12)))
    words += ["--approximate", *(["--data", str(rows)] if texts else [])]
    found = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert found.exit_code == 0, found.output
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    assert report["measured"]["texts"] == (
        {"fitted": 6, "held_out": 6} if texts else {"fitted": 5, "held_out": 5}
    )
    assert report["measured"]["held_out"]["native"]["kl"] > 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_bases_that_no_native_model_has(zoo: Zoo, tmp_path: Path) -> None:
    def refused(words: str, name: str = "llama", **options: Any) -> None:
        with pytest.raises(PeftMoeError, match=words):
            export(mixed(zoo, name), tmp_path / "out", **{"to": "native", **options})
        assert not (tmp_path / "out").exists()

    refused("those of mixtral; use --to mixtral", to="qwen3-moe", base=zoo.saved_base("llama"))
    refused("no native MoE has its layers", "gemma2", base=zoo.saved_base("gemma2"))
    refused("does not name its base|no folder", base=str(tmp_path / "nowhere"))
    refused("are 1.*another base|made on another base", base=_other_base(tmp_path / "other"))
    packed = tmp_path / "packed"
    shutil.copytree(zoo.saved_base("llama"), packed)
    _config(packed, quantization_config={"quant_method": "gptq"})
    refused("quantization_config", base=str(packed))
    windows = tmp_path / "windows"
    shutil.copytree(zoo.saved_base("qwen3"), windows)
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    _config(windows, use_sliding_window=True, sliding_window=4, layer_types=kinds)
    refused("look through a window", "qwen3", base=str(windows))


def _other_base(folder: Path) -> str:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 48}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(str(folder))
    return str(folder)


def test_biased_bases_are_refused(zoo: Zoo, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 48}
    base = LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, attention_bias=True)
    ).eval()
    base.save_pretrained(str(tmp_path / "base"))
    model = mixed(zoo, "llama", base=base)
    with pytest.raises(PeftMoeError, match=r"the base has biases .*Mixtral has none"):
        export(model, tmp_path / "out", "native", base=str(tmp_path / "base"), approximate=True)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "linear": ({"mixing": "linear"}, {}, "mixing='linear'.*train it with mixing='block'"),
    "top-p": ({"topk_method": "top_p", "top_p": 0.6}, {}, "no fixed number"),
    "per layer": ({"top_k_per_layer": [2, 2, 3]}, {}, "one number for all"),
    "scaled": ({"top_k": 2, "routed_scaling_factor": 0.5}, {}, "the sum of the gates"),
    "shards": ({}, {"max_shard_size": "5 cows"}, "KB, MB or GB"),
    "gates": ({}, {"gates": {"a": 1.0}}, "no effect with to='native'"),
    "rank": ({}, {"rank": 3}, "no effect with to='native'"),
    "one text": ({}, {"data": IDS[:1]}, "at least 2"),
    "no tokenizer": ({}, {"data": ["one text", "two"]}, "has a tokenizer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_write_nothing(zoo: Zoo, case: str, tmp_path: Path) -> None:
    fields, options, words = REFUSED[case]
    with pytest.raises(PeftMoeError, match=words):
        export(
            mixed(zoo, "llama", **fields), tmp_path / "out", "native", base=zoo.saved_base("llama"), **options
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [{"approximate": True}, {"data": IDS}, {"max_shard_size": "1GB"}])
def test_options_of_native_kinds_alone(zoo: Zoo, option: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(PeftMoeError, match="no effect with to='lora', only with native"):
        export(mixed(zoo, "llama"), tmp_path / "out", **option)


def test_files_of_the_base_come_along_and_rope_is_kept(zoo: Zoo, tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    config = LlamaConfig(
        vocab_size=48, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, hidden_act="gelu", rope_parameters=rope, rms_norm_eps=1e-3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = LlamaForCausalLM(config).eval()
    base.save_pretrained(str(tmp_path / "base"))
    (tmp_path / "base" / "tokenizer.json").write_text("tokens")
    (tmp_path / "base" / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.25}')
    model = mixed(zoo, "llama", base=base)
    options = ["--to", "mixtral", "--base", str(tmp_path / "base"), "--out", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(app, ["export", saved(model, tmp_path / "mixture"), *options])
    assert done.exit_code == 0, done.output
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(
        logits_of(found, {"input_ids": IDS}), logits_of(model, {"input_ids": IDS}), **FP32
    )
    assert found.generation_config.temperature == 0.25
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "tokens"
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["rope_theta"] == 5000.0
    assert values["rope_scaling"]["factor"] == 2.0


def test_narrow_weights_are_rounded_once_and_it_is_said(zoo: Zoo, tmp_path: Path) -> None:
    model = mixed(zoo, "llama")
    found, report = native(zoo, "llama", model, tmp_path, dtype="bfloat16")
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    whole = load_file(
        export(model, tmp_path / "full", "native", base=zoo.saved_base("llama")).out / "model.safetensors"
    )
    half = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(half[key], whole[key].bfloat16()) for key in whole)
    assert any("rounded to bfloat16" in note for note in report.notes)


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[int] = []

    def make() -> Tensor:
        gc.collect()
        alive.append(sum(isinstance(o, Tensor) and o.shape == (251, 3) for o in gc.get_objects()))
        return torch.zeros(251, 3)

    pieces = [Piece(f"t{n}", (251, 3), torch.float32, make) for n in range(7)]
    write_shards(tmp_path, pieces, 2 * 251 * 3 * 4, progress=False)
    assert alive == [0] * 7
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 4
    assert index["metadata"]["total_size"] == 7 * 251 * 3 * 4
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, framework="pt") as shard:
            assert shard.get_slice(name).get_shape() == [251, 3]


def test_a_wrong_tensor_stops_the_export(tmp_path: Path) -> None:
    wrong = Piece("t", (2, 3), torch.float32, lambda: torch.zeros(3, 2))
    with pytest.raises(PeftMoeError, match="where its sizes say"):
        write_shards(tmp_path, [wrong], 100, progress=False)
    endless = Piece("t", (1,), torch.float16, lambda: torch.tensor([torch.inf], dtype=torch.float16))
    with pytest.raises(PeftMoeError, match="overflows in float16"):
        write_shards(tmp_path, [endless], 100, progress=False)
    vast = Piece("t", (10**9, 10**9), torch.float16, lambda: torch.zeros(1))
    with pytest.raises(PeftMoeError, match="left; free some"):
        write_shards(tmp_path, [vast], 100, progress=False)


def test_sizes() -> None:
    assert read_size("5GB") == 5 * 10**9
    assert read_size("64 kb") == 64_000
