"""Full models become adapters: a LoRA that was merged comes back; what does not fit is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.adapters import RECIPES, Recipe
from support.bases import ARCHITECTURES, make_base
from support.batches import batch_for, logits_of, texts
from torch import nn

from peft_moe import PeftMoeError
from peft_moe.experts.adapter import open_experts
from peft_moe.experts.extraction.extract import extract_adapter
from peft_moe.experts.extraction.svd import RankRule, low_rank, marchenko_pastur_median, relative_error
from peft_moe.io.checkpoint import Checkpoint
from peft_moe.mixfile.inspect_parts import inspect_model

REPO = Path(__file__).parents[2]


def save(model: nn.Module, folder: Path, **how) -> str:
    model.save_pretrained(str(folder), **how)
    return str(folder)


def merged(zoo, architecture: str, folder: Path, dtype: torch.dtype, expert: str = "wide") -> tuple[str, str]:
    """A base and that base with an adapter merged into it, both saved in ``dtype``."""
    lora = PeftModel.from_pretrained(zoo.base(architecture), zoo.experts(architecture)[expert])
    full = lora.merge_and_unload()
    base = zoo.base(architecture).to(dtype)
    return save(base, folder / "base"), save(full.to(dtype), folder / "full")


def adapter_delta(folder: str, architecture: str) -> dict[str, torch.Tensor]:
    """ΔW of every layer of a LoRA on disk, as our reader scales it."""
    (file,) = open_experts({"x": folder}, make_base(architecture), allow_base_mismatch=True)
    pairs = {name: (file.read(name), file.spec.scaling_in(name)) for name in file.modules}
    return {name: scale * B.double() @ A.double() for name, ((A, B), scale) in pairs.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_merged_lora_comes_back(architecture, zoo, tmp_path):
    base, full = merged(zoo, architecture, tmp_path, torch.float32)
    report = extract_adapter(base, full, tmp_path / "out", progress=False)
    assert {layer.rank for layer in report.layers if layer.norm} == {4}  # of the recipe
    assert all(share == 0 for share in report.ignored_energy.values())
    wanted = adapter_delta(zoo.experts(architecture)["wide"], architecture)
    found = adapter_delta(str(tmp_path / "out"), architecture)
    assert set(found) == set(wanted)
    for name, delta in wanted.items():
        # Rounding of the merged weight to float32: 6e-8 of ‖W‖, and ‖ΔW‖ is a tenth of it.
        assert (found[name] - delta).norm() <= 3e-6 * delta.norm(), name
    model = PeftModel.from_pretrained(zoo.base(architecture), str(tmp_path / "out")).eval()
    batch = batch_for(architecture, texts())
    twin = type(zoo.base(architecture)).from_pretrained(full).eval()
    torch.testing.assert_close(logits_of(model, batch), logits_of(twin, batch), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_rank_is_found_under_the_rounding_of_bf16(architecture, zoo, tmp_path):
    base, full = merged(zoo, architecture, tmp_path, torch.bfloat16)
    report = extract_adapter(base, full, tmp_path / "out", progress=False)
    assert {layer.rank for layer in report.layers} == {4}
    assert report.dtype == "bfloat16"
    by_energy = extract_adapter(base, full, tmp_path / "e", energy=0.99999, progress=False)
    assert max(layer.rank for layer in by_energy.layers) > 30  # what the rounding looks like without the cut


def test_unequal_ranks_reload_in_peft_and_in_a_mixture(zoo, tmp_path):
    lora = PeftModel.from_pretrained(zoo.base("llama"), zoo.experts("llama")["wide"])
    other = zoo.adapter("llama", "patterned", Recipe("all", 7, {"r": 2, "rank_pattern": {"q_proj": 5}}))
    lora.load_adapter(other, "other")
    lora.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", combination_type="cat")
    lora.set_adapter("both")
    base, full = save(zoo.base("llama"), tmp_path / "base"), tmp_path / "full"
    save(lora.merge_and_unload(), full)
    report = extract_adapter(base, full, tmp_path / "out", progress=False)
    ranks = {layer.module: layer.rank for layer in report.layers}
    assert {rank for name, rank in ranks.items() if name.endswith("q_proj")} == {9}
    assert {rank for name, rank in ranks.items() if not name.endswith("q_proj")} == {6}
    model = PeftModel.from_pretrained(zoo.base("llama"), str(tmp_path / "out")).eval()
    batch = batch_for("llama", texts())
    twin = type(zoo.base("llama")).from_pretrained(full).eval()
    torch.testing.assert_close(logits_of(model, batch), logits_of(twin, batch), atol=2e-5, rtol=2e-5)
    mixture = zoo.mixture(
        "llama", experts={"x": str(tmp_path / "out")}, router="sum", allow_base_mismatch=True
    )
    torch.testing.assert_close(logits_of(mixture, batch), logits_of(twin, batch), atol=2e-5, rtol=2e-5)


def test_layers_without_change_are_not_adapted(zoo, tmp_path):
    base, full = merged(zoo, "llama", tmp_path, torch.float32, "upper")
    report = extract_adapter(base, full, tmp_path / "out", progress=False)
    still = {layer.module for layer in report.layers if layer.rank == 0}
    assert still == {layer.module for layer in report.layers if ".layers.0." in layer.module}
    assert all(layer.method == "unchanged" for layer in report.layers if layer.rank == 0)
    (file,) = open_experts({"x": str(tmp_path / "out")}, zoo.base("llama"), allow_base_mismatch=True)
    assert not still & set(file.modules)


def test_equal_extractions_are_equal_bytes(zoo, tmp_path):
    base, full = merged(zoo, "llama", tmp_path, torch.float32)
    for name in ("one", "two"):
        extract_adapter(base, full, tmp_path / name, progress=False)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "extraction.json"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_shards_ties_and_bare_models_are_paired(zoo, tmp_path):
    base, full = merged(zoo, "llama", tmp_path, torch.float32)
    model = type(zoo.base("llama")).from_pretrained(full)
    sharded = save(model, tmp_path / "sharded", max_shard_size="40KB")
    assert len(list(Path(sharded).glob("*.safetensors"))) > 3
    extract_adapter(base, full, tmp_path / "one", progress=False)
    extract_adapter(base, sharded, tmp_path / "two", progress=False)
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    bare = save(model.model, tmp_path / "bare")  # without the head and without "model."
    bare_base = save(zoo.base("llama").model, tmp_path / "bare_base")
    extract_adapter(bare_base, bare, tmp_path / "three", progress=False)
    assert set(load_file(tmp_path / "three" / "adapter_model.safetensors")) == {
        key.replace("base_model.model.model.", "base_model.model.")
        for key in load_file(tmp_path / "one" / "adapter_model.safetensors")
    }


def test_a_head_that_was_untied_is_held_against_the_embedding(tmp_path):
    torch.manual_seed(0)
    config = ARCHITECTURES["llama"].config()
    config.tie_word_embeddings = True
    base = type(make_base("llama"))(config).eval()
    folder = save(base, tmp_path / "base")
    assert "lm_head.weight" not in load_file(tmp_path / "base" / "model.safetensors")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] += 0.1 * torch.outer(torch.randn(128), torch.randn(64))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 0.5
    (tmp_path / "full").mkdir()
    save_file(tensors, tmp_path / "full" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "full" / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())
    with pytest.warns(UserWarning, match=r"of the change .* 'head'"):
        report = extract_adapter(folder, tmp_path / "full", tmp_path / "out", progress=False)
    (head,) = [one for one in report.ignored if one.kind == "head"]
    assert head.norm == pytest.approx(0.5 * (48 * 64) ** 0.5, rel=1e-5)
    assert [layer.rank for layer in report.layers if layer.rank] == [1]


def test_what_is_ignored_is_reported_with_its_energy(zoo, tmp_path):
    base, full = merged(zoo, "gpt2", tmp_path, torch.float32)
    tensors = load_file(Path(full) / "model.safetensors")
    key = next(name for name in tensors if name.endswith("h.1.mlp.c_fc.bias"))
    tensors[key] += 2.0
    save_file(tensors, Path(full) / "model.safetensors", metadata={"format": "pt"})
    report = extract_adapter(base, full, tmp_path / "out", target_modules=["c_attn"], progress=False)
    (bias,) = [one for one in report.ignored if one.norm and one.kind == "bias"]
    assert bias.norm == pytest.approx(2.0 * len(tensors[key]) ** 0.5)
    # An independent sum over the two files.
    before = load_file(Path(base) / "model.safetensors")
    squares = {name: float((tensors[name] - before[name]).double().square().sum()) for name in before}
    total = sum(squares.values())
    left_out = sum(v for n, v in squares.items() if n.endswith("weight") and "c_attn" not in n)
    assert report.ignored_energy["bias"] == pytest.approx(squares[key] / total, rel=1e-5)
    assert report.ignored_energy["linear"] == pytest.approx(left_out / total, rel=1e-4)
    assert json.loads((tmp_path / "out" / "extraction.json").read_text())["total"]["ignored_energy"]


@pytest.mark.parametrize(
    ("how", "ranks", "cut"),
    [
        ({"rank": 3}, {3}, False),
        ({"max_rank": 2}, {2}, True),
        ({"energy": 0.5, "max_rank": 64}, {1, 2}, False),
    ],
)
def test_rank_rules_bite(how, ranks, cut, zoo, tmp_path):
    base, full = merged(zoo, "llama", tmp_path, torch.float32)
    report = extract_adapter(base, full, tmp_path / "out", progress=False, **how)
    assert {layer.rank for layer in report.layers} == ranks
    assert all(layer.is_cut == cut for layer in report.layers)
    for layer in report.layers:  # relative error = √(1 − energy)
        assert layer.relative_error == pytest.approx((1 - layer.energy) ** 0.5, abs=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_of_the_factors(dtype, zoo, tmp_path):
    base, full = merged(zoo, "llama", tmp_path, torch.float32)
    report = extract_adapter(base, full, tmp_path / "out", dtype=dtype, progress=False)
    assert {t.dtype for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {
        getattr(torch, dtype)
    }
    # Both factors are rounded to 24, 8 or 11 bits; the report says what is written, not what was computed.
    low, high = {"float32": (0, 2e-6), "bfloat16": (5e-4, 1e-2), "float16": (5e-5, 1e-3)}[dtype]
    assert all(low <= layer.relative_error <= high for layer in report.layers)


def test_calibration_text_gives_output_errors_and_divergence(zoo, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from peft_moe.cli.demo import BASE_NAME, asset_path

    tokenizer = AutoTokenizer.from_pretrained(asset_path(BASE_NAME))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    folder = save(base, tmp_path / "base")
    tokenizer.save_pretrained(folder)
    with torch.no_grad():
        for layer in base.model.layers:
            for linear in (layer.self_attn.q_proj, layer.mlp.up_proj):
                rows, columns = linear.weight.shape
                linear.weight += 0.02 * torch.randn(rows, 6) @ torch.randn(6, columns)
    full = save(base, tmp_path / "full")
    reports = {
        rank: extract_adapter(
            folder,
            full,
            tmp_path / f"r{rank}",
            rank=rank,
            texts=["12 + 30 = 42", "reverse abc"],
            progress=False,
        )
        for rank in (2, 6)
    }
    moved = [layer for layer in reports[2].layers if layer.norm]
    assert len(moved) == 4
    assert all(0.05 < layer.output_error < 1 for layer in moved)
    assert all(layer.output_error < 1e-5 for layer in reports[6].layers)
    # Logits in float32 leave about 5e-8.
    assert reports[6].logit_kl < 1e-6 < reports[2].logit_kl < reports[2].base_kl
    assert "KL" in "\n".join(reports[2].summary())


# Refusals. Each makes one fault in a sound pair of models; nothing may be written.


def _drop(folder, key="model.layers.1.mlp.up_proj.weight"):
    path = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k != key}, path, metadata={"format": "pt"})


def _extra(folder):
    path = folder / "model.safetensors"
    save_file(
        {**load_file(path), "model.layers.7.x.weight": torch.zeros(2, 2)}, path, metadata={"format": "pt"}
    )


def _nan(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.down_proj.weight"][3, 4] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})


def _reshape(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(64, 100)
    save_file(tensors, path, metadata={"format": "pt"})


def _vocabulary(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[key] = torch.cat([tensors[key], tensors[key][:8]])
    save_file(tensors, path, metadata={"format": "pt"})


def _config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _shard_lost(folder):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shard_outside(folder):
    index = {"weight_map": {"a": "../base/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _adapter(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")


def _same(folder):
    (folder / "model.safetensors").write_bytes((folder.parent / "base" / "model.safetensors").read_bytes())


REFUSALS = {
    "missing tensor": (_drop, r"no tensor 'model.layers.1.mlp.up_proj.weight'"),
    "extra tensor": (_extra, r"no tensor 'model.layers.7.x.weight'"),
    "NaN": (_nan, r"'model.layers.0.mlp.down_proj' holds values that are not finite"),
    "other shape": (_reshape, r"down_proj.weight' is \[64, 100\].*\[64, 128\]"),
    "vocabulary": (_vocabulary, r"vocabulary has 56 tokens .* base's 48"),
    "architecture": (lambda f: _config(f, model_type="qwen3"), r"model_type='qwen3'.*'llama'"),
    "quantised": (lambda f: _config(f, quantization_config={"quant_method": "gptq"}), r"says 'gptq'"),
    "pickle": (_pickle, r"only pytorch_model.bin: a pickle can run code"),
    "truncated": (_truncate, r"model.safetensors is not a sound safetensors file"),
    "lost shard": (_shard_lost, r"names 'model-00001-of-00002.safetensors', which is not there"),
    "shard elsewhere": (_shard_outside, r"names '../base/model.safetensors'"),
    "adapter": (_adapter, r"it is an adapter already"),
    "no change": (_same, r"bit for bit"),
    "no config": (lambda f: (f / "config.json").unlink(), r"no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), r"cannot be read as JSON"),
}


@pytest.mark.parametrize("fault", REFUSALS)
def test_refusals(fault, zoo, tmp_path):
    base, full = merged(zoo, "llama", tmp_path, torch.float32)
    damage, message = REFUSALS[fault]
    damage(Path(full))
    with pytest.raises(PeftMoeError, match=message) as caught:
        extract_adapter(base, full, tmp_path / "out", progress=False)
    assert "Fix: " in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "full"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"rank": 0}, r"rank=0 must be a whole number"),
        ({"rank": True}, r"rank=True must be"),
        ({"rank": 4, "energy": 0.9}, r"both choose the rank"),
        ({"energy": 1.5}, r"energy=1.5 must be"),
        ({"max_rank": 0}, r"max_rank=0"),
        ({"dtype": "float8"}, r"dtype='float8' is not known. Did you mean"),
        ({"target_modules": ["q_prj"]}, r"'q_prj' matches no linear layer. Did you mean 'q_proj'"),
        ({"texts": ["abc"]}, r"calibration text needs a tokenizer"),
    ],
)
def test_refusals_of_settings(how, message, zoo, tmp_path):
    base, full = merged(zoo, "llama", tmp_path, torch.float32)
    with pytest.raises(PeftMoeError, match=message):
        extract_adapter(base, full, tmp_path / "out", progress=False, **how)
    assert not (tmp_path / "out").exists()


def test_places_that_are_not_written_to(zoo, tmp_path):
    base, full = merged(zoo, "llama", tmp_path, torch.float32)
    for place, message in ((tmp_path / "full" / "x", "overlap"), (tmp_path, "overlap")):
        with pytest.raises(PeftMoeError, match=message):
            extract_adapter(base, full, place, progress=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(PeftMoeError, match="not empty"):
        extract_adapter(base, full, tmp_path / "out", progress=False)
    extract_adapter(base, full, tmp_path / "out", overwrite=True, progress=False)
    assert not (tmp_path / "out" / "mine.txt").exists()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(PeftMoeError, match="symbolic link"):
        extract_adapter(base, full, tmp_path / "link", overwrite=True, progress=False)


def test_models_in_the_cache_of_the_hub(zoo, tmp_path):
    base, full = merged(zoo, "llama", tmp_path, torch.float32)
    commit = "0123456789abcdef0123456789abcdef01234567"
    for name, folder in (("base", base), ("full", full)):
        place = tmp_path / "hub" / f"models--org--{name}"
        (place / "snapshots").mkdir(parents=True)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(commit)
        Path(folder).rename(place / "snapshots" / commit)
    script = (
        "from peft_moe.experts.extraction.extract import extract_adapter as e\n"
        f"e('org/base', 'org/full@main', {str(tmp_path / 'out')!r}, progress=False)\n"
        "try: e('org/base', 'org/lost', 'x', progress=False)\n"
        "except ValueError as error: print(error)"
    )
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Model 'org/lost': no folder of that name, and the Hub says" in done.stdout
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"


def test_an_architecture_outside_transformers_is_never_imported(zoo, tmp_path):
    base, full = merged(zoo, "llama", tmp_path, torch.float32)
    for folder in (base, full):
        _config(Path(folder), architectures=["torch"])
    with pytest.raises(PeftMoeError, match="none of transformers' own"):
        extract_adapter(base, full, tmp_path / "out", progress=False)


# The decomposition itself, against dense linear algebra.


def noisy(rows: int, columns: int, rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    signal = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    return signal, signal + 0.05 * torch.randn(rows, columns, generator=generator)


@pytest.mark.parametrize("shape", [(600, 900), (900, 600), (1024, 1024)])
def test_randomised_factors_are_singular_ones(shape):
    _, delta = noisy(*shape, rank=12)
    found = low_rank(delta, RankRule())
    assert (found.method, found.rank) == ("randomised", 12)
    assert 0 < found.check <= 1e-3
    S = torch.linalg.svdvals(delta.double())
    best = float((S[12:].square().sum() / S.square().sum()).sqrt())
    # A misfit of 1e-3 costs at most its square of the energy.
    assert relative_error(delta, found.A, found.B, found.norm) == pytest.approx(best, abs=2e-6 / best)
    torch.testing.assert_close(found.A.norm(dim=1), S[:12].sqrt().float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.B.norm(dim=0), S[:12].sqrt().float(), rtol=1e-4, atol=0)


def test_where_the_check_fails_the_decomposition_is_exact(monkeypatch):
    from peft_moe.experts.extraction import svd as extract_svd

    monkeypatch.setattr(extract_svd, "MAX_ITERATIONS", 1)
    flat = torch.randn(600, 600, generator=torch.Generator().manual_seed(0))  # no gap to converge by
    found = low_rank(flat, RankRule(rank=5))
    S = torch.linalg.svdvals(flat)
    assert found.method == "exact"
    assert found.energy == pytest.approx(float(S[:5].square().sum() / S.square().sum()), rel=1e-4)


def test_pure_noise_has_no_rank_and_zero_has_none():
    for shape in ((200, 300), (700, 800)):
        noise = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
        assert low_rank(noise, RankRule()).rank == 0
    nothing = low_rank(torch.zeros(4, 6), RankRule(rank=2))
    assert (nothing.rank, nothing.norm, nothing.A.shape, nothing.B.shape) == (0, 0.0, (0, 6), (4, 0))


def test_threshold_is_the_published_one():
    # ω(1) = λ(1)/√μ(1) of Gavish and Donoho (2014).
    assert 4 / 3**0.5 / marchenko_pastur_median(1.0) ** 0.5 == pytest.approx(2.858, abs=1e-3)
    draws = torch.randn(400, 1600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    measured = torch.linalg.svdvals(draws).square().quantile(0.5) / 1600
    # 400 values over a width of 2: neighbours are 5e-3 apart.
    assert marchenko_pastur_median(0.25) == pytest.approx(float(measured), abs=1e-2)


@pytest.mark.parametrize("energy", [0.3, 0.9, 1.0])
def test_energy_keeps_the_fewest(energy):
    _, delta = noisy(40, 60, rank=5)
    shares = torch.linalg.svdvals(delta.double()).square().cumsum(0)
    shares = shares / shares[-1]
    found = low_rank(delta, RankRule(energy=energy, max_rank=64))
    assert found.rank == int((shares < energy - 1e-6).sum()) + 1


MEASURE = """
import sys, torch, json, warnings
from pathlib import Path
from peft_moe.experts.extraction.extract import extract_adapter
warnings.simplefilter("ignore")
small, large = Path(sys.argv[1]), Path(sys.argv[2])
extract_adapter(small / "base", small / "full", small / "out", rank=4, progress=False)  # libraries come in

def status(word):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(word + ":"))
    return int(line.split()[1]) * 1024

Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = status("VmRSS")
extract_adapter(large / "base", large / "full", large / "out", rank=4, progress=False)
print(json.dumps(status("VmHWM") - before))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_two_tensors_are_in_memory_and_the_result(dtype, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    for name, width in (("small", 64), ("large", 1024)):
        config = LlamaConfig(
            vocab_size=64, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4,
        )  # fmt: skip
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(dtype)
        save(model, tmp_path / name / "base")
        with torch.no_grad():
            for parameter in model.model.layers.parameters():
                if parameter.dim() == 2:
                    rows, columns = parameter.shape
                    parameter += 0.05 * torch.randn(rows, 3) @ torch.randn(3, columns)
        save(model, tmp_path / name / "full")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large")]
    # Large buffers go back to the system when they are freed, so that the peak is what is in use.
    environment = {"MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    peak = json.loads(done.stdout.splitlines()[-1])
    model = Checkpoint.open(tmp_path / "large" / "full")
    tensor = 4 * max(at.numel for at in model.tensors.values())  # float32
    result = (tmp_path / "large" / "out" / "adapter_model.safetensors").stat().st_size
    assert model.num_bytes > 4 * tensor  # else the bound below would hold for anybody
    # Beside two tensors and the result: pages of libraries that are first touched here, buffers of products.
    assert peak <= 2 * tensor + 2 * result + 6e6, (peak / 1e6, tensor / 1e6, result / 1e6)
    base = Checkpoint.open(tmp_path / "large" / "base")
    announced = inspect_model("x", str(tmp_path / "large" / "full"), base, {"rank": 4})[0].facts[
        "memory to extract"
    ]
    assert announced == pytest.approx(peak, rel=0.25), (announced / 1e6, peak / 1e6)


def test_recipes_differ():
    # The tests above lean on it: ranks 4, 3 and 6, and one expert that leaves layer 0 alone.
    assert RECIPES["wide"].lora["r"] == 4
    assert RECIPES["upper"].lora["layers_to_transform"] == [1, 2]
