"""Ways out: one plain LoRA, merged weights, the experts themselves, loaded by PEFT and transformers alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.adapters import RECIPES, Recipe
from support.bases import BASES
from support.batches import batch_for, logits_of, texts
from support.zoo import Zoo
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from peft_moe import PeftMoeError, use_experts
from peft_moe.cli.main import app
from peft_moe.export import export

# float32 against float32 along another order of summation, as in the table of equalities.
FP32 = {"atol": 1e-5, "rtol": 1e-5}
# Logits of size 3 in float64 hold 1e-15; a gate or scale rounded to float32 on the way shows as 1e-8.
FP64 = {"atol": 1e-11, "rtol": 1e-11}
MOVED = 1e-2
# Attention and Conv1D, a sparse base, an encoder-decoder, a classifier-less encoder.
BASES_HERE = ["llama", "gpt2", "mixtral", "t5", "bert"]
# Every router whose gates do not depend on the input.
STATIC: dict[str, dict[str, Any]] = {
    "uniform": {"router": "uniform"},
    "sum": {"router": "sum", "routed_scaling_factor": 0.7},
    "static": {"router": "static"},
    "cat": {"router": "cat"},
    "lorahub": {"router": "lorahub"},
    "block": {"router": "static", "router_scope": "block"},
    "model": {"router": "static", "router_scope": "model"},
    "null": {"router": "static", "null_expert": True},
    "shared": {"router": "static", "shared_experts": ["narrow"]},
}


def run(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def plain(zoo: Zoo, name: str, folder: Path, base: nn.Module | None = None) -> PeftModel:
    return PeftModel.from_pretrained(zoo.base(name) if base is None else base, str(folder)).eval()


def apart(left: torch.Tensor, right: torch.Tensor) -> float:
    return (left - right).abs().max().item()


def saved(model: PeftModel, folder: Path) -> str:
    model.save_pretrained(str(folder))
    return str(folder)


@pytest.mark.parametrize("name", BASES_HERE)
def test_a_lora_has_the_mixtures_logits(zoo: Zoo, name: str, tmp_path: Path) -> None:
    batch = batch_for(name, texts())
    model = zoo.mixture(name, "uniform")
    mixed = logits_of(model, batch)
    assert apart(mixed, logits_of(zoo.base(name), batch)) > MOVED
    report = export(saved(model, tmp_path / "mixture"), tmp_path / "lora")
    torch.testing.assert_close(logits_of(plain(zoo, name, tmp_path / "lora"), batch), mixed, **FP32)
    assert report.rank == 13
    assert report.error < 1e-6  # rounding of float32


@pytest.mark.parametrize("routing", STATIC)
def test_every_constant_router_is_one_lora_in_float64(zoo: Zoo, routing: str, tmp_path: Path) -> None:
    batch = batch_for("llama", texts())
    model = zoo.mixture("llama", "uniform", **{"router": "uniform", **STATIC[routing]}, seed=1).double()
    mixed = logits_of(model, batch)
    export(model, tmp_path / "live")
    alone = plain(zoo, "llama", tmp_path / "live", zoo.base("llama").double())
    torch.testing.assert_close(logits_of(alone, batch), mixed, **FP64)
    # The folder's router is read from the file, without a model.
    narrow = model.float()
    export(saved(narrow, tmp_path / "mixture"), tmp_path / "lora")
    torch.testing.assert_close(
        logits_of(plain(zoo, "llama", tmp_path / "lora"), batch), logits_of(narrow, batch), **FP32
    )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("routing", ["dense", "top2", "block", "token-base", "prompt-probe"])
def test_fixed_gates_make_any_mixture_one_lora(zoo: Zoo, name: str, routing: str, tmp_path: Path) -> None:
    batch = batch_for(name, texts())
    model = zoo.mixture(name, routing)
    folder = saved(model, tmp_path / "mixture")
    run("export", folder, "--out", str(tmp_path / "lora"), "--gates", "wide=0.5,upper=0.25")
    with model.use_gates({"wide": 0.5, "upper": 0.25}):
        mixed = logits_of(model, batch)
    alone = logits_of(plain(zoo, name, tmp_path / "lora"), batch)
    torch.testing.assert_close(alone, mixed, **FP32)
    assert apart(alone, logits_of(model, batch)) > MOVED
    stored = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert stored["r"] == 10  # nothing of the expert that was left out


def test_one_expert_keeps_its_bits(zoo: Zoo, tmp_path: Path) -> None:
    batch = batch_for("llama", texts())
    folder = saved(zoo.mixture("llama", "dense"), tmp_path / "mixture")
    run("export", folder, "--out", str(tmp_path / "lora"), "--gates", "narrow")
    wanted = load_file(Path(zoo.experts("llama")["narrow"], "adapter_model.safetensors"))
    found = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    # Its scale went through float32, as in the mixture.
    alone = plain(zoo, "llama", tmp_path / "lora")
    torch.testing.assert_close(logits_of(alone, batch), logits_of(zoo.lora("llama", "narrow"), batch), **FP32)


# Scales that trip: rsLoRA with patterns, a rank per module, an alpha far from the rank.
EXOTIC = {
    "rank_pattern": Recipe("all", 11, {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 7, "o_proj": 2}}),
    "alpha_pattern": Recipe(
        "all", 12, {"r": 4, "lora_alpha": 3, "alpha_pattern": {"layers.1.mlp.up_proj": 31}}
    ),
    "rslora_patterns": Recipe(
        "attention",
        13,
        {
            "r": 5,
            "lora_alpha": 7,
            "use_rslora": True,
            "rank_pattern": {"v_proj": 3},
            "alpha_pattern": {"v_proj": 11},
        },
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_exotic_scales_survive(zoo: Zoo, dtype: torch.dtype, tmp_path: Path) -> None:
    batch = batch_for("llama", texts())
    kind = str(dtype)[6:]
    experts = {n: zoo.adapter("llama", f"{n}-{kind}", r, dtype) for n, r in EXOTIC.items()}
    model = zoo.mixture("llama", "uniform", experts=experts, router="static", seed=3)
    mixed = logits_of(model, batch)
    folder = saved(model, tmp_path / "mixture")
    export(folder, tmp_path / "lora")
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    # Gates times bf16 numbers are no bf16 numbers: they are kept in float32, else this would be 1e-3 off.
    torch.testing.assert_close(logits_of(plain(zoo, "llama", tmp_path / "lora"), batch), mixed, **FP32)
    assert {t.dtype for key, t in stored.items() if "lora_A" in key} == {dtype}
    # Asked to round, it does, and says by how much.
    report = export(folder, tmp_path / "rounded", dtype="bfloat16")
    assert 1e-4 < report.error < 2**-7
    export(folder, tmp_path / "experts", to="adapters")
    for name, source in experts.items():
        same_adapter(Path(source), tmp_path / "experts" / name)
        one, other = (
            logits_of(plain(zoo, "llama", f), batch) for f in (Path(source), tmp_path / "experts" / name)
        )
        assert torch.equal(one, other)


def same_adapter(source: Path, found: Path) -> None:
    """Tensors bit for bit, and every field that says where and how they act."""
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (source, found))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (source, found)]
    fields = (
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "task_type",
    )
    for field in (*fields, "fan_in_fan_out", "base_model_name_or_path", "peft_type", "bias", "use_dora"):
        assert configs[0][field] == configs[1][field], field
    assert set(configs[0]["target_modules"]) == set(configs[1]["target_modules"])


@pytest.mark.parametrize("name", BASES_HERE)
def test_experts_come_back_bit_for_bit(zoo: Zoo, name: str, tmp_path: Path) -> None:
    batch = batch_for(name, texts())
    folder = saved(zoo.mixture(name, "uniform" if name == "t5" else "dense"), tmp_path / "mixture")
    run("export", folder, "--to", "adapters", "--out", str(tmp_path / "out"))
    for expert, source in zoo.experts(name).items():
        same_adapter(Path(source), tmp_path / "out" / expert)
        alone = logits_of(plain(zoo, name, tmp_path / "out" / expert), batch)
        assert torch.equal(alone, logits_of(zoo.lora(name, expert), batch))


def test_experts_of_several_dtypes_come_back_in_their_own(zoo: Zoo, tmp_path: Path) -> None:
    half = zoo.adapter("llama", "half", Recipe("all", 21, {"r": 2, "lora_alpha": 2}), torch.bfloat16)
    experts = {"half": half, "wide": zoo.experts("llama")["wide"]}
    model = zoo.mixture("llama", "dense", experts=experts)
    export(model, tmp_path / "out", to="adapters")
    for name, source in experts.items():
        same_adapter(Path(source), tmp_path / "out" / name)


def test_experts_below_a_tap_are_gone_and_that_is_said(zoo: Zoo, tmp_path: Path) -> None:
    model = zoo.mixture("llama", "token-base")
    report = export(model, tmp_path / "out", to="adapters")
    assert any("fewer modules" in note for note in report.notes)
    batch = batch_for("llama", texts())
    with model.use_gates({"wide": 1.0}):
        mixed = logits_of(model, batch)
    torch.testing.assert_close(
        logits_of(plain(zoo, "llama", tmp_path / "out" / "wide"), batch), mixed, **FP32
    )


def test_fresh_experts_come_out_too(zoo: Zoo, tmp_path: Path) -> None:
    fields = {"experts": 3, "target_modules": ["q_proj", "up_proj"], "init_weights": False, "r": 2}
    model = zoo.mixture("llama", "uniform", **fields)
    batch = batch_for("llama", texts())
    export(model, tmp_path / "out", to="adapters")
    export(model, tmp_path / "lora")
    torch.testing.assert_close(
        logits_of(plain(zoo, "llama", tmp_path / "lora"), batch), logits_of(model, batch), **FP32
    )
    with model.use_gates({"expert_1": 1.0}):
        mixed = logits_of(model, batch)
    torch.testing.assert_close(
        logits_of(plain(zoo, "llama", tmp_path / "out" / "expert_1"), batch), mixed, **FP32
    )


def test_layers_with_fewer_experts(zoo: Zoo, tmp_path: Path) -> None:
    fields = {
        "experts": 4,
        "experts_per_layer": [1, 2, 4],
        "target_modules": ["q_proj"],
        "init_weights": False,
    }
    model = zoo.mixture("llama", "uniform", **fields, router="static", seed=2)
    batch = batch_for("llama", texts())
    export(saved(model, tmp_path / "mixture"), tmp_path / "lora")
    torch.testing.assert_close(
        logits_of(plain(zoo, "llama", tmp_path / "lora"), batch), logits_of(model, batch), **FP32
    )


@pytest.mark.parametrize("bias", ["all", "molora_only"])
def test_what_trained_beside_the_experts_comes_along(zoo: Zoo, bias: str, tmp_path: Path) -> None:
    model = zoo.mixture("bert", "uniform", bias=bias, modules_to_save=["classifier"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    batch = batch_for("bert", texts())
    export(saved(model, tmp_path / "mixture"), tmp_path / "lora")
    torch.testing.assert_close(
        logits_of(plain(zoo, "bert", tmp_path / "lora"), batch), logits_of(model, batch), **FP32
    )
    report = export(tmp_path / "mixture", tmp_path / "out", to="adapters")
    assert any("belong to no expert" in note for note in report.notes)


def test_a_cut_is_the_best_one_and_says_what_it_costs(zoo: Zoo, tmp_path: Path) -> None:
    model = zoo.mixture("llama", "uniform")
    report = export(model, tmp_path / "cut", rank=5)
    wrong = whole = 0.0
    cut = load_file(tmp_path / "cut" / "adapter_model.safetensors")
    for layer in (m for m in model.modules() if hasattr(m, "get_delta_weight")):
        delta = layer.get_delta_weight("default").detach().double()
        values = torch.linalg.svdvals(delta)
        kept = [cut[f"base_model.model.{layer.name}.lora_{side}.weight"].double() for side in "BA"]
        error = float((kept[0] @ kept[1] - delta).norm())
        # Eckart and Young: no matrix of rank 5 is nearer. float32 factors round at 1e-7.
        assert error == pytest.approx(float(values[5:].square().sum().sqrt()), rel=1e-5, abs=1e-6)
        assert report.module_errors[layer.name] == pytest.approx(
            error / float(delta.norm()), rel=1e-4, abs=1e-6
        )
        wrong, whole = wrong + error**2, whole + float(delta.norm()) ** 2
    assert report.error == pytest.approx((wrong / whole) ** 0.5, rel=1e-4)
    assert max(len(t) for key, t in cut.items() if "lora_A" in key) == 5
    exact = export(model, tmp_path / "whole", rank=13)
    assert exact.error < 1e-6 < report.error


def test_the_lora_needs_nothing_of_ours(zoo: Zoo, tmp_path: Path) -> None:
    model = zoo.mixture("llama", "uniform")
    export(model, tmp_path / "lora")
    ids = torch.arange(3, 15)[None]
    torch.save(logits_of(model, {"input_ids": ids}), tmp_path / "wanted.pt")
    script = """if True:
        import sys, torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
        with torch.no_grad():
            found = model(input_ids=torch.arange(3, 15)[None]).logits
        torch.testing.assert_close(found, torch.load(sys.argv[3], weights_only=True), atol=1e-5, rtol=1e-5)
        assert not any(name.split(".")[0] == "peft_moe" for name in sys.modules)
        print("same")
    """
    words = [
        sys.executable,
        "-c",
        script,
        zoo.saved_base("llama"),
        str(tmp_path / "lora"),
        str(tmp_path / "wanted.pt"),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120, cwd=tmp_path)
    assert done.stdout.strip() == "same"


@pytest.mark.parametrize("name", BASES_HERE)
@pytest.mark.parametrize("gates", [None, {"wide": 0.5, "narrow": 1.5}], ids=["own", "fixed"])
def test_merged_weights_have_the_mixtures_logits(
    zoo: Zoo, name: str, gates: dict[str, float] | None, tmp_path: Path
) -> None:
    batch = batch_for(name, texts())
    routing = "dense" if gates else "uniform"
    model = zoo.mixture(name, routing)
    with model.use_gates(gates or dict.fromkeys(RECIPES, 1 / 3)):
        mixed = logits_of(model, batch)
    export(
        saved(model, tmp_path / "mixture"),
        tmp_path / "out",
        to="merged",
        base=zoo.saved_base(name),
        gates=gates,
    )
    merged = type(zoo.base(name)).from_pretrained(tmp_path / "out").eval()
    assert not any("molora" in key or "lora" in key for key in merged.state_dict())
    torch.testing.assert_close(logits_of(merged, batch), mixed, **FP32)
    # A model in memory is merged in a copy.
    before = logits_of(model, batch)
    export(model, tmp_path / "live", to="merged", gates=gates)
    again = type(zoo.base(name)).from_pretrained(tmp_path / "live").eval()
    torch.testing.assert_close(logits_of(again, batch), mixed, **FP32)
    assert torch.equal(logits_of(model, batch), before)


def test_merged_brings_tokenizer_and_generation_config(zoo: Zoo, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(zoo.saved_base("llama"), base)
    (base / "tokenizer.json").write_text("base's")
    (base / "tokenizer_config.json").write_text("base's")
    (base / "generation_config.json").write_text('{"temperature": 0.25, "do_sample": true}')
    folder = Path(saved(zoo.mixture("llama", "uniform"), tmp_path / "mixture"))
    (folder / "tokenizer.json").write_text("mixture's")
    run("export", str(folder), "--to", "merged", "--base", str(base), "--out", str(tmp_path / "out"))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "mixture's"
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "base's"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.temperature == 0.25
    run("export", str(folder), "--to", "merged", "--base", str(base), "--out", str(tmp_path / "half"),
        "--dtype", "bfloat16")  # fmt: skip
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}


def test_dynamic_gates_are_refused_with_the_ways_that_work(zoo: Zoo, tmp_path: Path) -> None:
    folder = saved(zoo.mixture("llama", "dense"), tmp_path / "mixture")
    for to in ("lora", "merged"):
        with pytest.raises(PeftMoeError) as refused:
            run("export", folder, "--to", to, "--out", str(tmp_path / "out"))
        for way in ("--gates", "distilled-lora", "adapters", "peft_moe imported"):
            assert way in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixture"]


def test_mixed_networks_are_no_lora_but_one_of_them_is(zoo: Zoo, tmp_path: Path) -> None:
    batch = batch_for("llama", texts())
    model = zoo.mixture("llama", "uniform", mixing="block")
    for gates in (None, {"wide": 0.5, "upper": 0.5}, {"wide": 2.0}):
        with pytest.raises(PeftMoeError, match=r"mixing='block'.*one expert at weight 1 \(--gates wide\)"):
            export(model, tmp_path / "out", "lora", gates=gates)
    assert list(tmp_path.iterdir()) == []
    with model.use_gates({"wide": 1.0}):
        mixed = logits_of(model, batch)
    export(model, tmp_path / "lora", gates={"wide": 1.0})
    torch.testing.assert_close(logits_of(plain(zoo, "llama", tmp_path / "lora"), batch), mixed, **FP32)
    export(saved(model, tmp_path / "mixture"), tmp_path / "experts", to="adapters")
    for expert, source in zoo.experts("llama").items():
        same_adapter(Path(source), tmp_path / "experts" / expert)


def test_quantised_bases_are_refused(zoo: Zoo, four_bit: Any, tmp_path: Path) -> None:
    model = zoo.mixture("llama", "uniform", base=four_bit())
    with pytest.raises(PeftMoeError, match=r"quantised.*16 or 32 bits"):
        export(model, tmp_path / "out", to="merged")
    base = tmp_path / "base"
    shutil.copytree(zoo.saved_base("llama"), base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    folder = saved(model, tmp_path / "mixture")
    with pytest.raises(PeftMoeError, match=r"quantised.*16 or 32 bits"):
        export(folder, tmp_path / "out", to="merged", base=str(base))
    # Into the full base it goes, and says what it was made on.
    report = export(folder, tmp_path / "out", to="merged", base=zoo.saved_base("llama"))
    assert any("bitsandbytes nf4" in note for note in report.notes)
    # A LoRA has no base weights to pack.
    export(folder, tmp_path / "lora")


def _break_digest(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    key = next(name for name in tensors if name.endswith("molora_A.weight"))
    tensors[key][0, 0] += 1
    save_file(tensors, folder / "adapter_model.safetensors")


def _cut_file(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _drop_rank(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    key = next(name for name in tensors if name.endswith("molora_A.weight"))
    tensors[key] = tensors[key][1:].clone()
    save_file(tensors, folder / "adapter_model.safetensors")


def _drop_router(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({k: t for k, t in tensors.items() if "router" not in k}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_break_digest, "not those that its config describes"),
        (_cut_file, "no sound safetensors file"),
        (_drop_rank, "do not belong together"),
        (_drop_router, "router of .* cannot be read"),
    ],
)
def test_damaged_folders_are_refused(zoo: Zoo, damage: Any, words: str, tmp_path: Path) -> None:
    folder = saved(zoo.mixture("llama", "static", router_scope="module"), tmp_path / "mixture")
    damage(Path(folder))
    with pytest.raises(PeftMoeError, match=words):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"to": "lore"}, "Did you mean 'lora'"),
    "gates of adapters": ({"to": "adapters", "gates": {"wide": 1.0}}, "no effect with to='adapters'"),
    "rank of merged": ({"to": "merged", "rank": 4}, "no effect"),
    "base of lora": ({"base": "x"}, "no effect"),
    "rank": ({"rank": 0}, "at least 1"),
    "dtype": ({"dtype": "float31"}, "float32"),
    "expert": ({"gates": {"wdie": 1.0}}, "wide"),
    "nothing": ({"gates": {"wide": 0.0}}, "all 0"),
    "negative": ({"gates": {"wide": -1.0}}, "≥ 0"),
    "adapter": ({"adapter": "defualt"}, "default"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_write_nothing(zoo: Zoo, case: str, tmp_path: Path) -> None:
    options, words = REFUSED[case]
    with pytest.raises(PeftMoeError, match=words):
        export(zoo.mixture("llama", "uniform"), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["wide=", "wide=x", "=1", "wide,wide", "", "wide=nan"])
def test_gates_that_cannot_be_read(zoo: Zoo, text: str, tmp_path: Path) -> None:
    folder = saved(zoo.mixture("llama", "uniform"), tmp_path / "mixture")
    with pytest.raises(PeftMoeError, match="--gates"):
        run("export", folder, "--out", str(tmp_path / "out"), "--gates", text)


def test_what_is_no_mixture_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    adapter = zoo.experts("llama")["wide"]
    with pytest.raises(PeftMoeError, match="no mixture"):
        export(adapter, tmp_path / "out")
    with pytest.raises(PeftMoeError, match="no mixture"):
        export(zoo.lora("llama", "wide"), tmp_path / "out")
    with pytest.raises(PeftMoeError, match="no folder"):
        export(tmp_path / "nothing", tmp_path / "out")
    model = zoo.mixture("llama", "uniform")
    with use_experts("wide"), pytest.raises(PeftMoeError, match="leave the `with` block"):
        export(model, tmp_path / "out")


def test_an_existing_folder_stays_unless_told(zoo: Zoo, tmp_path: Path) -> None:
    folder = saved(zoo.mixture("llama", "uniform"), tmp_path / "mixture")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(PeftMoeError, match="not empty"):
        run("export", folder, "--out", str(out))
    with pytest.raises(PeftMoeError, match="overlap"):
        run("export", folder, "--out", folder, "--overwrite")
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    run("export", folder, "--out", str(out), "--overwrite")
    assert not (out / "mine.txt").exists()


def test_equal_exports_are_equal_bytes_and_the_report_says_it_all(zoo: Zoo, tmp_path: Path) -> None:
    folder = saved(zoo.mixture("llama", "static", seed=4), tmp_path / "mixture")
    printed = json.loads(run("export", folder, "--out", str(tmp_path / "one"), "--json"))
    export(folder, tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    assert printed == json.loads((tmp_path / "one" / "export.json").read_text())
    assert printed["experts"] == list(RECIPES)
    assert printed["error"] < 1e-6
    assert (
        BASES["llama"].task_type
        == json.loads((tmp_path / "one/adapter_config.json").read_text())["task_type"]
    )
