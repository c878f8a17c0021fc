"""`recipes/train_preferences.py` for a few steps of each method, on a tiny base."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from support.preferences import rows_for
from support.training import DOMAINS, samples, tokenizer
from support.zoo import Zoo

import peft_moe  # noqa: F401  # registers the adapter's type
from peft_moe.errors import PeftMoeError
from peft_moe.training.trainers.reference_model import FILE
from peft_moe.training.trainers.rewards import exact, overlap, reward_named

ROOT = Path(__file__).parents[2]
SHORT = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "logging_steps": 1,
    "max_length": None,
}
OF_GRPO = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1}


@pytest.fixture(scope="module")
def folder(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base with a tokenizer, and for each method and domain a file."""
    path = tmp_path_factory.mktemp("preferences")
    zoo.base("llama").save_pretrained(path / "base")
    tokenizer().save_pretrained(path / "base")
    for domain in DOMAINS:
        kinds: dict[str, list[dict[str, Any]]] = {kind: rows_for(kind, 40) for kind in ("dpo", "kto")}
        kinds["grpo"] = list(samples(40))
        for kind, rows in kinds.items():
            mine = [row for row in rows if row["domain"] == domain]
            (path / f"{kind}-{domain}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mine))
    return path


def run(
    monkeypatch: pytest.MonkeyPatch,
    zoo: Zoo,
    folder: Path,
    name: str,
    method: str,
    *more: str,
    **changes: Any,
) -> dict[str, Any]:
    """The shipped YAML with changes, as a user runs it; what it says of itself at the end."""
    shipped = "demo_grpo.yaml" if method == "grpo" else "demo_dpo.yaml"
    settings = yaml.safe_load((ROOT / "recipes" / "configs" / shipped).read_text())
    paths = {
        "method": method,
        "model_name_or_path": str(folder / "base"),
        "experts": zoo.experts("llama"),
        "train_files": {domain: str(folder / f"{method}-{domain}.jsonl") for domain in DOMAINS},
        "output_dir": str(folder / name),
    }
    short = {k: v for k, v in SHORT.items() if method != "grpo" or k != "max_length"}
    wanted = settings | short | (OF_GRPO if method == "grpo" else {}) | paths | changes
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump({k: v for k, v in wanted.items() if v is not None}, sort_keys=False))
    script = str(ROOT / "recipes" / "train_preferences.py")
    monkeypatch.setattr(sys, "argv", [script, "--config", str(config), *more])
    runpy.run_path(script, run_name="__main__")
    return json.loads((folder / name / "summary.json").read_text())


def router_of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / name / "adapter_model.safetensors")
    return {key: value for key, value in tensors.items() if "router" in key}


@pytest.mark.parametrize(
    ("method", "metric"),
    [("dpo", "rewards/accuracies"), ("kto", "loss"), ("grpo", "reward")],
)
def test_each_method_trains_a_router_and_says_what_became_of_it(
    monkeypatch: pytest.MonkeyPatch, zoo: Zoo, folder: Path, method: str, metric: str
) -> None:
    own = folder / "mine.py"
    own.write_text("def length(completions, **columns):\n    return [float(len(c)) for c in completions]\n")
    # Of this base no completion is right, and of equal rewards there is nothing to learn.
    changes = {"rewards": ["exact", f"{own}:length"]} if method == "grpo" else {}
    summary = run(monkeypatch, zoo, folder, method, method, "--reference", "base", **changes)
    assert summary["metric"] == metric
    assert summary["steps"] == 3
    assert set(summary["load"]) == set(DOMAINS)
    for shares in summary["load"].values():
        assert sum(shares.values()) == pytest.approx(1, abs=1e-3)  # four numbers of 4 digits
    assert summary["after"]
    loaded = PeftModel.from_pretrained(zoo.base("llama"), folder / method)
    assert loaded.peft_config["default"].expert_names == ["wide", "narrow", "upper"]
    assert all(value.abs().max() > 0 for value in router_of(folder, method).values())


def test_a_saved_mixture_is_the_start(
    monkeypatch: pytest.MonkeyPatch, zoo: Zoo, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, zoo, folder, "first", "dpo", fit=True)
    going_on = {"experts": None, "mixture": None, "adapter": str(folder / "first")}
    saving = {"save_strategy": "steps", "save_steps": 2}
    run(monkeypatch, zoo, folder, "second", "dpo", **going_on, **saving)
    first, second = router_of(folder, "first"), router_of(folder, "second")
    held = load_file(folder / "second" / "checkpoint-2" / FILE)
    for name, value in first.items():
        assert not torch.equal(value, second[name])
        kept = next(tensor for key, tensor in held.items() if key.endswith(name.rpartition(".")[2]))
        assert torch.equal(kept, value)
    straight = router_of(folder, "second")
    (folder / "second" / "checkpoint-3").rename(folder / "straight-3")
    run(monkeypatch, zoo, folder, "second", "dpo", "--resume_from_checkpoint", "last", **going_on, **saving)
    assert f"Resuming from {folder / 'second' / 'checkpoint-2'}" in capsys.readouterr().out
    assert all(torch.equal(value, straight[name]) for name, value in router_of(folder, "second").items())


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("ppo", {}, r"method='ppo' is unknown"),
        ("dpo", {"rewards": ["exact"]}, "have no effect with method=dpo"),
        ("grpo", {"rewards": ["exakt"]}, r"'exakt' is neither a reward nor.*Did you mean 'exact'"),
        ("dpo", {"adapter": "runs/x"}, "Give either `experts`"),
        ("dpo", {"experts": None, "adapter": "runs/x"}, "`mixture` and `fit` are for a new mixture"),
        ("dpo", {"reference": "bass"}, "reference='bass' is unknown"),
        (
            "dpo",
            {"mixture": {"rooter": "context"}},
            r"'rooter' is not a field of MoLoraConfig\. Did you mean",
        ),
        ("dpo", {"lora_r": 64}, "lora_r has no effect"),
        ("dpo", {"eval_fraction": 1.0}, r"10 records with eval_fraction=1\.0 leave none to train on"),
        ("kto", {"num_generations": 4}, "num_generations"),
    ],
)
def test_refusals(
    monkeypatch: pytest.MonkeyPatch,
    zoo: Zoo,
    folder: Path,
    method: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, zoo, folder, "refused", method, **changes)


def test_rewards_compare_with_the_answer(tmp_path: Path) -> None:
    said, right = ["xii\n", "xiv", "", "ab"], ["xii", "xii", "xii", "abcd"]
    assert exact(said, right) == [1.0, 0.0, 0.0, 0.0]
    assert overlap(said, right) == [1.0, pytest.approx(2 / 3), 0.0, 0.5]
    chats = [[{"role": "assistant", "content": "xii"}]]
    assert exact(chats, chats) == overlap(chats, [[{"role": "assistant", "content": "xii "}]]) == [1.0]
    own = tmp_path / "mine.py"
    own.write_text("def brevity(completions, **columns):\n    return [-float(len(c)) for c in completions]\n")
    assert reward_named(f"{own}:brevity")(["abc"]) == [-3.0]
    assert reward_named("exact") is exact
    with pytest.raises(PeftMoeError, match=r"has no function 'brevty'.*Did you mean 'brevity'"):
        reward_named(f"{own}:brevty")
    with pytest.raises(PeftMoeError, match="neither a reward nor a function in a file"):
        reward_named(f"{tmp_path}/none.py:brevity")
