"""One LoRA trained to imitate a mixture, with the real trainer; the gap it reports is the gap there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from support.models import load_base, save_adapter, save_base, tokenizer
from support.routing import set_routers
from support.training import samples
from typer.testing import CliRunner

from peft_moe import MoLoraConfig, PeftMoeError
from peft_moe.cli.main import app
from peft_moe.export import Distillation, export
from peft_moe.training.trainers.student import measure


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A base with a tokenizer, a mixture with a router that reads its input, and texts."""
    folder = tmp_path_factory.mktemp("distilled")
    base = save_base(folder / "base")
    experts = {name: save_adapter(base, folder / name, seed) for name, seed in (("math", 1), ("code", 2))}
    config = MoLoraConfig(experts=experts, router="linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_base(base), config).eval()
    set_routers(model, 0)
    model.save_pretrained(str(folder / "mixture"))
    rows = [{key: row[key] for key in ("prompt", "completion")} for row in samples(200)]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "folder": folder,
        "base": base,
        "mixture": str(folder / "mixture"),
        "texts": str(folder / "texts.jsonl"),
    }


def test_training_closes_the_gap_and_the_report_is_true(made: dict[str, Any], tmp_path: Path) -> None:
    words = ["export", made["mixture"], "--to", "distilled-lora", "--rank", "3", "--data", made["texts"]]
    words += [
        "--steps",
        "60",
        "--learning-rate",
        "3e-3",
        "--max-length",
        "64",
        "--out",
        str(tmp_path / "lora"),
    ]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "KL to the mixture" in result.output
    told = json.loads((tmp_path / "lora" / "export.json").read_text())["measured"]
    rows = told["held_out"]
    assert rows["mixture"]["kl"] == 0.0
    assert rows["mixture"]["agreement"] == 1.0
    # Cut mean gates leave something to learn, and 60 steps learn a part of it.
    assert rows["distilled"]["kl"] < 0.9 * rows["start"]["kl"] < 0.9 * rows["base"]["kl"]
    assert told["kl_closed"] == pytest.approx(1 - rows["distilled"]["kl"] / rows["base"]["kl"])
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {len(t) for key, t in stored.items() if "lora_A" in key} == {3}
    # The LoRA alone, in plain PEFT, against the mixture on other tokens: as near as was said.
    mixture = PeftModel.from_pretrained(load_base(made["base"]), made["mixture"]).eval()
    student = PeftModel.from_pretrained(load_base(made["base"]), tmp_path / "lora").eval()
    ids = torch.randint(3, 40, (8, 12), generator=torch.Generator().manual_seed(3))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    gaps, tokens = measure(mixture, student, [batch])
    assert tokens == 8 * 11
    assert gaps["student"].kl < 0.8 * gaps["base"].kl


def test_zero_steps_keep_the_start_and_a_model_in_memory_stays(made: dict[str, Any], tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(load_base(made["base"]), made["mixture"]).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    how = Distillation(made["texts"], steps=0, max_length=64, tokenizer=tokenizer())
    report = export(model, tmp_path / "lora", "distilled-lora", rank=2, distillation=how)
    assert report.measured is not None
    rows = report.measured["held_out"]
    assert rows["distilled"] == rows["start"]
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not model.training


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "rank": ({"rank": None}, {}, "needs rank"),
    "texts": ({"distillation": None}, {}, "needs data"),
    "gates": ({"gates": {"math": 1.0}}, {}, "no effect"),
    "steps": ({}, {"steps": -1}, "steps=-1"),
    "batch": ({}, {"batch_size": 0}, "batch_size=0"),
    "temperature": ({}, {"temperature": 0.0}, "temperature=0"),
    "learning rate": ({}, {"learning_rate": -1.0}, "learning_rate=-1"),
    "fraction": ({}, {"eval_fraction": 1.0}, "eval_fraction=1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_write_nothing(made: dict[str, Any], case: str, tmp_path: Path) -> None:
    options, fields, words = REFUSED[case]
    how = Distillation(**{"data": made["texts"], **fields})
    with pytest.raises(PeftMoeError, match=words):
        export(
            made["mixture"], tmp_path / "out", "distilled-lora", **{"rank": 2, "distillation": how, **options}
        )
    assert list(tmp_path.iterdir()) == []
