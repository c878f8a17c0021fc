"""The recipes that make a base and its experts, for three steps each.

One base and one expert are trained as a user does it, in processes of their own. The other cases
run the same scripts as `__main__` in this process: a new process imports torch and trl for 10 s.
"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
SMALL = {
    "vocab_size": 270,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "block_size": 32,
    "max_eval_blocks": 4,
}
SHORT = {"max_steps": 3, "per_device_train_batch_size": 2, "bf16": False, "logging_steps": 1}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|endoftext|>{% endfor %}"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_config(path: Path, shipped: str, **changes: Any) -> str:
    """The shipped YAML with changes: a key that its recipe no longer knows fails here."""
    settings = yaml.safe_load((ROOT / "recipes" / "configs" / shipped).read_text())
    path.write_text(yaml.safe_dump(settings | SHORT | changes))
    return str(path)


def expert_config(folder: Path, name: str, data: str, base: str = "base", **changes: Any) -> str:
    paths = {
        "model_name_or_path": str(folder / base),
        "dataset_name": str(folder / data),
        "eval_dataset_name": None,
        "output_dir": str(folder / name),
    }
    return write_config(folder / f"{name}.yaml", "text_expert.yaml", lora_r=4, **paths, **changes)


def run_process(recipe: str, config: str, *overrides: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, f"recipes/{recipe}.py", "--config", config, *overrides]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_script(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    script = str(ROOT / "recipes" / name)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(script, run_name="__main__")


def run_here(monkeypatch: pytest.MonkeyPatch, config: str, *overrides: str) -> None:
    run_script(monkeypatch, "train_expert.py", "--config", config, *overrides)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of four column sets; a base of 3 steps in `base/`, with a chat template in `chat/`."""
    path = tmp_path_factory.mktemp("recipes")
    pairs = [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}", "domain": "math"} for i in range(40)]
    turns = (("user", "prompt"), ("assistant", "completion"))
    chats = [{"messages": [{"role": r, "content": p[c]} for r, c in turns]} for p in pairs]
    write_rows(path / "pairs.jsonl", pairs)
    write_rows(path / "text.jsonl", [{"text": p["prompt"] + p["completion"]} for p in pairs])
    write_rows(path / "chat.jsonl", chats)
    write_rows(path / "alpaca.jsonl", [{"instruction": "a", "input": "", "output": "b"}])
    config = write_config(
        path / "base.yaml",
        "text_base.yaml",
        **SMALL,
        train_files=[str(path / "pairs.jsonl")],
        sampled_files=["$RECIPE_TEST_FOLDER/text.jsonl"],
        eval_files=[str(path / "text.jsonl")],
        output_dir=str(path / "base"),
        eval_strategy="no",
        save_strategy="no",
    )
    os.environ["RECIPE_TEST_FOLDER"] = str(path)  # file names in YAML may hold variables
    assert "heldout_loss" in run_process("train_base", config)
    del os.environ["RECIPE_TEST_FOLDER"]
    tokenizer = AutoTokenizer.from_pretrained(path / "base")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path / "chat")
    AutoModelForCausalLM.from_pretrained(path / "base").save_pretrained(path / "chat")
    return path


def check_adapter(folder: Path, name: str, rank: int, rslora: bool = False) -> torch.Tensor:
    """The folder is a plain PEFT adapter that changes the base; returns one `lora_A`, [R, I]."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    ids = torch.arange(20)[None]
    before = base(input_ids=ids).logits
    model = PeftModel.from_pretrained(base, folder / name)
    config = model.peft_config["default"]
    assert (config.peft_type.value, config.r, config.use_rslora) == ("LORA", rank, rslora)
    assert len(config.target_modules) == 7
    assert not torch.equal(model(input_ids=ids).logits, before)
    summary = json.loads((folder / name / "summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["heldout_loss"] != summary["heldout_loss_base"]
    return load_file(folder / name / "adapter_model.safetensors")[Q_PROJ]


def test_the_base_has_a_sound_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert tokenizer.eos_token_id is not None
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    # 256 bytes, 2 special tokens and as many merges as this little text has, up to 270
    assert 258 < model.config.vocab_size == len(tokenizer) <= SMALL["vocab_size"]
    text = "Straße, déjà vu\n\tx = 2026  # 汉字"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("1234")["input_ids"]) == 4  # digits stay single


def test_prompt_completion_with_overrides_and_resume(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = expert_config(folder, "pairs", "pairs.jsonl", save_strategy="steps", save_steps=2)
    same = ("--lora_r", "5", "--seed", "7")  # the command line wins over the YAML
    assert "Held-out loss: base" in run_process("train_expert", config, *same)
    straight = check_adapter(folder, "pairs", rank=5)
    (folder / "pairs" / "adapter_model.safetensors").unlink()

    # Step 3 again, from the checkpoint of step 2: the same weights, bit for bit.
    checkpoint = str(folder / "pairs" / "checkpoint-2")
    run_here(monkeypatch, config, *same, "--resume_from_checkpoint", checkpoint)
    assert torch.equal(check_adapter(folder, "pairs", rank=5), straight)
    trained = [line for line in capsys.readouterr().out.splitlines() if "'grad_norm'" in line]
    assert len(trained) == 1


def test_text_and_messages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch, expert_config(folder, "text", "text.jsonl", use_rslora=True))
    chat = expert_config(folder, "chats", "chat.jsonl", base="chat", seed=2)
    run_here(monkeypatch, chat)
    one = check_adapter(folder, "text", rank=4, rslora=True)
    two = check_adapter(folder, "chats", rank=4)
    # Other seeds give another lora_A: experts that share a start are correlated for ever.
    assert torch.nn.functional.cosine_similarity(one.flatten(), two.flatten(), 0) < 0.5


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        ("alpaca.jsonl", {}, "alpaca.jsonl has columns instruction, input, output; needed"),
        ("chat.jsonl", {}, "this tokenizer has no chat template"),
        ("pairs.jsonl", {"max_length": 2}, "every prompt alone reaches max_length=2"),
    ],
)
def test_refusals(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    data: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        run_here(monkeypatch, expert_config(folder, "refused", data, **changes))


def test_the_text_experiment_around_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`recipes/text`: the preparation, the table of losses, and what `run.sh` says without data."""
    for domain in ("math", "code", "medicine", "law", "german", "french", "general", "science"):
        (folder / "raw" / domain).mkdir(parents=True)
        rows = [
            {"prompt": "Answer:", "completion": "7"},
            {"prompt": "a\n", "completion": "b\u2028"},
        ]
        for split in ("train", "valid", "test"):
            write_rows(folder / "raw" / domain / f"{split}.jsonl", rows)
    run_script(monkeypatch, "text/prepare.py", str(folder / "raw"), str(folder / "data"))
    lines = (folder / "data" / "law" / "test.jsonl").read_text().split("\n")
    assert [json.loads(line)["completion"] for line in lines if line] == [" 7", "b\u2028"]

    # An expert whose lora_B is zero has the losses of its base, to the last digit.
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    get_peft_model(base, LoraConfig(target_modules="all-linear")).save_pretrained(folder / "law")
    paths = {"base": "base", "experts": "law", "data": "data", "output": "matrix.json"}
    arguments = [x for key, name in paths.items() for x in (f"--{key}", str(folder / name))]
    run_script(monkeypatch, "text/losses.py", *arguments, "--records", "2")
    result = json.loads((folder / "matrix.json").read_text())
    assert result["completion"]["law"] == result["completion"]["base"]
    assert len(result["whole"]["law"]) == 8
    assert 4 < result["whole"]["base"]["math"] < 7  # log(270) = 5.6 after three steps
    assert "Loss on completions" in capsys.readouterr().out

    environment = os.environ | {"PEFT_MOE_DATA": str(folder / "nowhere")}
    command = ["bash", str(ROOT / "recipes" / "text" / "run.sh")]
    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "Set PEFT_MOE_DATA to the folder that holds" in refused.stderr
