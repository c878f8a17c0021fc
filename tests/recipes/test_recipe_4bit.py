"""`recipes/configs/text_router_4bit.yaml`: its memory plan, and a run of it on a tiny base."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from support.training import DOMAINS, samples, tokenizer
from support.zoo import Zoo
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig
from trl import TrlParser

from peft_moe import MoLoraConfig
from peft_moe.planning import MemoryPlan, Training, plan_memory

ROOT = Path(__file__).parents[2]
YAML = ROOT / "recipes" / "configs" / "text_router_4bit.yaml"
LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)
# What a change of torch or transformers may move without the comment being wrong.
NEAR = 0.03


def in_comment(pattern: str) -> int:
    found = re.search(pattern, YAML.read_text())
    assert found, pattern
    return int(found[1].replace(",", ""))


def plan(settings: dict[str, Any], **changes: Any) -> MemoryPlan:
    training = {
        "sequence": settings["max_length"],
        "batch": settings["per_device_train_batch_size"],
        "precision": settings["bnb_4bit_quant_type"],
        "double_quant": settings["use_bnb_nested_quant"],
        "dtype": settings["dtype"],
        "checkpointing": settings["gradient_checkpointing"],
        **changes,
    }
    config = MoLoraConfig(
        experts=len(settings["experts"]), r=16, task_type="CAUSAL_LM", **settings["mixture"]
    )
    return plan_memory(LLAMA_8B, config, Training(**training))


def test_the_plan_in_its_head_is_the_plan_of_its_settings() -> None:
    settings = yaml.safe_load(YAML.read_text())
    found = plan(settings)
    for name in (
        "base, linear layers (nf4)",
        "base, other weights",
        "experts",
        "activations, gradients, logits",
    ):
        written = in_comment(rf"#   {re.escape(name)} +([\d,]+)")
        assert written == pytest.approx(found.parts[name] / 2**20, rel=NEAR), name
    assert in_comment(r"#   together +([\d,]+)") == pytest.approx(found.total / 2**20, rel=NEAR)
    assert found.total < 14e9
    for words, changes in (("with a batch of 4", {"batch": 4}), ("without grad", {"checkpointing": False})):
        activations = plan(settings, **changes).parts["activations, gradients, logits"]
        assert in_comment(rf"([\d,]+) {words}") == pytest.approx(activations / 2**20, rel=NEAR)


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_it_runs_on_a_tiny_base(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Three steps through the recipe; then the saved router on a base of the same bits generates."""
    pytest.importorskip("bitsandbytes")
    zoo.base("llama").save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    for domain in DOMAINS:
        rows = [row for row in samples(40) if row["domain"] == domain]
        (tmp_path / f"{domain}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = yaml.safe_load(YAML.read_text())
    settings |= {
        "model_name_or_path": str(tmp_path / "base"),
        "experts": zoo.experts("llama"),
        "train_files": {domain: str(tmp_path / f"{domain}.jsonl") for domain in DOMAINS},
        "output_dir": str(tmp_path / "out"),
        "max_steps": 3,
        "gradient_accumulation_steps": 2,
        "max_length": 60,
        "save_strategy": "no",
        "use_cpu": True,
    }
    if kind == "int8":
        settings |= {"load_in_4bit": False, "load_in_8bit": True}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    script = str(ROOT / "recipes" / "train_router.py")
    monkeypatch.setattr(sys, "argv", [script, "--config", str(tmp_path / "run.yaml")])
    runpy.run_path(script, run_name="__main__")

    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    routers = {key: value for key, value in saved.items() if "molora_router" in key}
    assert {value.dtype for value in routers.values()} == {torch.float32}
    assert any(value.abs().max() > 0 for value in routers.values())
    quantization = (
        BitsAndBytesConfig(load_in_8bit=True)
        if kind == "int8"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    )
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantization, dtype=torch.bfloat16
    )
    model = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    assert model.peft_config["default"].base_precision == f"bitsandbytes {kind}"
    out = model.generate(input_ids=torch.arange(3, 9)[None], max_new_tokens=3, min_new_tokens=3)
    assert out.shape == (1, 9)


def test_its_keys_are_trls(tmp_path: Path) -> None:
    """As everywhere in TRL; a wrong one is an error."""
    from trl import ModelConfig, get_quantization_config

    wanted = {
        key: value for key, value in yaml.safe_load(YAML.read_text()).items() if "bnb" in key or "load" in key
    }
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump({**wanted, "dtype": "bfloat16"}))
    (parsed,) = TrlParser((ModelConfig,)).parse_args_and_config(["--config", str(tmp_path / "keys.yaml")])
    made = get_quantization_config(parsed)
    assert made.load_in_4bit
    assert made.bnb_4bit_quant_type == "nf4"
    assert made.bnb_4bit_use_double_quant
    assert made.bnb_4bit_compute_dtype == torch.bfloat16
