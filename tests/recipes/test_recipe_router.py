"""`recipes/train_router.py` for three steps, and every shipped YAML against its recipe's arguments.

One case runs as a user runs it, in a process of its own. The others run the same script as `__main__`
in this process: a new process imports torch and trl for 10 s.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
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

import peft_moe  # noqa: F401  # registers the adapter's type
from peft_moe.training import StrictTrlParser

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes").rglob("*.yaml"))
EXPERTS = ("wide", "narrow", "upper")
SHORT = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "bf16": False,
    "max_length": 60,
    "logging_steps": 1,
    "save_strategy": "no",
}
# Marks what the assistant says, so that TRL can leave the rest out of the loss.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<eos>"
    "{% endgeneration %}{% else %}{{ m['content'] }}?{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, with and without a chat template, and data of three kinds for four domains."""
    path = tmp_path_factory.mktemp("router")
    for name in ("base", "chat"):
        zoo.base("llama").save_pretrained(path / name)
        words = tokenizer()
        words.chat_template = TEMPLATE if name == "chat" else None
        words.save_pretrained(path / name)
    for domain in DOMAINS:
        rows = [row for row in samples(80) if row["domain"] == domain]
        turns = (("user", "prompt"), ("assistant", "completion"))
        kinds: dict[str, list[dict[str, Any]]] = {
            "pairs": [{**row, "domain": "overwritten", "source": domain} for row in rows],
            "text": [{"text": row["prompt"] + row["completion"]} for row in rows],
            "chats": [{"messages": [{"role": r, "content": row[c]} for r, c in turns]} for row in rows],
        }
        for kind, some in kinds.items():
            (path / f"{kind}-{domain}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return path


def write_config(zoo: Zoo, folder: Path, name: str, kind: str = "pairs", **changes: Any) -> str:
    """The shipped YAML with changes: a key that the recipe no longer knows fails here."""
    settings = yaml.safe_load((ROOT / "recipes" / "configs" / "text_router.yaml").read_text())
    paths = {
        "model_name_or_path": str(folder / "base"),
        "experts": zoo.experts("llama"),
        "train_files": {domain: str(folder / f"{kind}-{domain}.jsonl") for domain in DOMAINS},
        "output_dir": str(folder / name),
    }
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(settings | SHORT | paths | changes, sort_keys=False))
    return str(config)


def run_here(monkeypatch: pytest.MonkeyPatch, config: str, *overrides: str) -> None:
    script = str(ROOT / "recipes" / "train_router.py")
    monkeypatch.setattr(sys, "argv", [script, "--config", config, *overrides])
    runpy.run_path(script, run_name="__main__")


def router_of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / name / "adapter_model.safetensors")
    found = {key: value for key, value in tensors.items() if "molora_router" in key}
    assert found
    return found


def summary_of(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name / "summary.json").read_text())


def test_as_a_user_runs_it_and_resumed(
    zoo: Zoo, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ROUTER_DATA", str(folder))  # file names in YAML may hold variables
    files = {domain: f"$ROUTER_DATA/pairs-{domain}.jsonl" for domain in DOMAINS}
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    config = write_config(zoo, folder, "pairs", train_files=files, **saving)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "recipes/train_router.py", "--config", config, "--seed", "5"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "trainable params: 260 ||" in done.stdout  # 4 columns of 64 weights and a bias
    assert re.search(r"  weather +\d+\.\d{4}  wide \d\.\d\d  narrow .* null \d\.\d\d\n", done.stdout)

    summary = summary_of(folder, "pairs")
    assert summary["steps"] == 3
    assert list(summary["load"]) == list(DOMAINS)
    for shares in summary["load"].values():
        assert list(shares) == [*EXPERTS, "null"]
        assert sum(shares.values()) == pytest.approx(1, abs=1e-3)  # four numbers of 4 digits
    assert summary["heldout_loss"].keys() == summary["heldout_loss_before"].keys() == set(DOMAINS)
    assert summary["heldout_loss"] != summary["heldout_loss_before"]

    loaded = PeftModel.from_pretrained(zoo.base("llama"), folder / "pairs")
    assert loaded.peft_config["default"].expert_names == list(EXPERTS)
    straight = router_of(folder, "pairs")
    (folder / "pairs" / "adapter_model.safetensors").unlink()
    # Step 3 again from the checkpoint of step 2, found by itself: the same router, bit for bit.
    (folder / "pairs" / "checkpoint-3").rename(folder / "straight-3")
    run_here(monkeypatch, config, "--seed", "5", "--resume_from_checkpoint", "last")
    again = router_of(folder, "pairs")
    assert all(torch.equal(again[name], value) for name, value in straight.items())
    printed = capsys.readouterr().out
    assert f"Resuming from {folder / 'pairs' / 'checkpoint-2'}" in printed
    assert printed.count("'grad_norm'") == 1  # one step was trained, not three
    assert summary_of(folder, "pairs")["heldout_loss_before"] is None


def test_fit_chats_and_text(
    zoo: Zoo, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"samples_per_domain": 10, "eval_fraction": 0.2}
    run_here(monkeypatch, write_config(zoo, folder, "fit", fit=True, **sizes))
    counts = {"train": 32, **dict.fromkeys(DOMAINS, 2)}
    assert f"records that fit: {counts}" in capsys.readouterr().out
    assert 0.25 < summary_of(folder, "fit")["fitted_training_accuracy"] <= 1
    chats = {"model_name_or_path": str(folder / "chat"), "assistant_only_loss": True, "fit": True}
    run_here(monkeypatch, write_config(zoo, folder, "chats", "chats", **chats))
    assert summary_of(folder, "chats")["steps"] == 3
    per_token = {"router": "linear", "top_k": 2, "null_expert": True}
    run_here(monkeypatch, write_config(zoo, folder, "text", "text", mixture=per_token))
    assert len(router_of(folder, "text")) == 2 * 7 * 3  # weight and bias, seven linear layers, three blocks


def test_robustness_options_shape_the_training_data(
    zoo: Zoo, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """72 samples: half generic, a third of all records are pairs; held-out data stay as they were."""
    options = {"generic_share": 0.5, "domain_randomisation": 0.25, "switching_share": 1 / 3}
    plain = {"generic_share": None, "domain_randomisation": 0.0, "switching_share": 0.0}
    options["fit"] = plain["fit"] = False  # so that both start from the same router
    run_here(monkeypatch, write_config(zoo, folder, "plain", **plain))
    run_here(monkeypatch, write_config(zoo, folder, "robust", **options))
    printed = capsys.readouterr().out
    heldout = dict.fromkeys(DOMAINS, 2)
    assert f"records that fit: { {'train': 72, **heldout} }" in printed
    assert f"records that fit: { {'train': 54, **heldout} }" in printed  # 18 pairs, 36 alone
    before = [summary_of(folder, name)["heldout_loss_before"] for name in ("plain", "robust")]
    assert before[0] == before[1]
    one, other = (router_of(folder, name) for name in ("plain", "robust"))
    assert any(not torch.equal(other[name], value) for name, value in one.items())


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("pairs", {"generic_share": 1.5}, r"generic_share=1\.5 must be a share"),
        (
            "pairs",
            {"domain_randomisation": 0.1, "mixture": {"router": "context"}},
            "has no effect: nothing reads",
        ),
        ("pairs", {"switching_share": 0.5, "max_length": 18}, "lower the share, or raise max_length"),
        (
            "pairs",
            {"mixture": {"rooter": "context"}},
            r"'rooter' is not a field of MoLoraConfig\. Did you mean",
        ),
        ("pairs", {"mixture": {"experts": 3}}, "'experts' is not a field"),
        ("pairs", {"lora_r": 64}, "lora_r has no effect: the experts are trained already"),
        ("pairs", {"eval_fraction": 1.0}, r"20 records with eval_fraction=1\.0 leave none to train on"),
        ("pairs", {"max_length": 3}, "every prompt reaches max_length=3"),
        ("pairs", {"experts": {"wide": "/no/such/folder"}}, "/no/such/folder"),
        ("chats", {}, "the tokenizer has no template"),
        ("text", {"mixture": {"router": "context"}}, r"a sample with \['domain', 'text'\] has no prompt"),
        ("text", {"mixture": {"router": "context"}, "fit": False}, "a row of this batch has no prompt"),
        ("pairs", {"no_such_key": 1}, "no_such_key"),
    ],
)
def test_refusals(
    zoo: Zoo,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        run_here(monkeypatch, write_config(zoo, folder, "refused", kind, **changes))


def test_all_shipped_configs_are_found() -> None:
    names = [
        "demo_distil",
        "demo_dpo",
        "demo_grpo",
        "demo_jeet",
        "demo_moe_ce",
        "demo_ple",
        "demo_router",
        "demo_stages",
        "text_base",
        "text_expert",
        "text_router",
        "text_router_4bit",
    ]
    assert [path.stem for path in CONFIGS] == names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_begin_with_their_command_and_hold_known_keys(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    header = text[: text.index("\n\n")]
    assert all(line.startswith("#") for line in header.splitlines())
    command = re.search(rf"python recipes/(\w+\.py) --config {path.relative_to(ROOT)}", header)
    assert command, "the header holds no launch command"
    script = ROOT / "recipes" / command[1]
    recipe = runpy.run_path(str(script))
    if "parser_for" in recipe:
        parser = recipe["parser_for"](recipe["asked_method"](["--config", str(path)]))
    else:
        listed = re.search(r"StrictTrlParser\(\s*\(([^)]+)\)", script.read_text())
        assert listed
        parser = StrictTrlParser([recipe[name.strip()] for name in listed[1].split(",") if name.strip()])
    parsed = parser.parse_args_and_config(["--config", str(path)])
    assert isinstance(yaml.safe_load(text)["learning_rate"], float)  # YAML reads 1e-4 as a text
    if command[1] == "train_router.py":
        config = recipe["mixture_config"](parsed[0], parsed[2])
        experts, domains = set(config.expert_names), set(parsed[0].train_files)
        assert experts <= domains
        assert config.null_expert == (experts < domains)  # where some domain has no expert
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(text + "\nlerning_rate: 1.0\n")
    with pytest.raises(ValueError, match="lerning_rate"):
        parser.parse_args_and_config(["--config", str(wrong)])
    wrong.write_text(text + "\nseed: 7\n")  # YAML readers keep the last of two, silently
    with pytest.raises(ValueError, match="'seed' appears twice"):
        parser.parse_args_and_config(["--config", str(wrong)])
