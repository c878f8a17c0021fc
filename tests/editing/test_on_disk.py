"""Editing a folder from the command line is editing in memory, without the base's weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.adapters import Recipe
from support.zoo import Zoo
from typer.testing import CliRunner

from peft_moe import PeftMoeError, editing
from peft_moe.cli.main import app

ROUTINGS = ["dense", "top2", "uniform", "prompt-probe", "block"]
NEW = Recipe("all", 9, {"r": 5, "lora_alpha": 10})


def run(*words: str) -> None:
    result = CliRunner().invoke(app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output


def saved(zoo: Zoo, routing: str, folder: Path) -> Path:
    zoo.mixture("llama", routing).save_pretrained(folder)
    return folder


def base_without_weights(zoo: Zoo, folder: Path) -> str:
    """The base's headers tell the truth, its numbers are NaN: whoever used them would show it."""
    shutil.copytree(zoo.saved_base("llama"), folder)
    file = folder / "model.safetensors"
    empty = {name: torch.full_like(t, torch.nan) for name, t in load_file(file).items()}
    save_file(empty, file, metadata={"format": "pt"})
    return str(folder)


def same_folder(one: Path, other: Path) -> None:
    left, right = load_file(one / "adapter_model.safetensors"), load_file(other / "adapter_model.safetensors")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) and left[key].dtype == right[key].dtype for key in left)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (one, other)]
    for config in configs:
        config.pop("base_model_name_or_path")  # models in memory here have no name
    assert configs[0] == configs[1]


def names_of(model: PeftModel) -> list[str]:
    return list(model.peft_config["default"].expert_names)


COMMANDS = {
    "add-expert": lambda m, extra: editing.add_expert(m, "fourth", extra),
    "remove-expert": lambda m, extra: editing.remove_expert(m, "second"),
    "replace-expert": lambda m, extra: editing.replace_expert(m, "second", extra),
    "rename-expert": lambda m, extra: editing.rename_expert(m, "second", "other"),
    "reorder-experts": lambda m, extra: editing.reorder_experts(m, names_of(m)[::-1]),
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_the_edit_in_memory(zoo: Zoo, command: str, routing: str, tmp_path: Path) -> None:
    source, base = saved(zoo, routing, tmp_path / "mixture"), base_without_weights(zoo, tmp_path / "base")
    extra = zoo.adapter("llama", "extra", NEW)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    model = PeftModel.from_pretrained(zoo.base("llama"), source)
    names = names_of(model)
    second = names[1]
    if command in ("remove-expert", "replace-expert", "rename-expert") and second != "second":
        editing.rename_expert(model, second, "second")
        model.save_pretrained(source)
        before = {path.name: path.read_bytes() for path in source.iterdir()}
    words = {
        "add-expert": ["fourth", extra],
        "remove-expert": ["second"],
        "replace-expert": ["second", extra],
        "rename-expert": ["second", "other"],
        "reorder-experts": list(reversed(names)),
    }[command]
    run(command, str(source), *words, "--out", str(tmp_path / "edited"), "--base", base)
    COMMANDS[command](model, extra)
    model.save_pretrained(tmp_path / "wanted")
    same_folder(tmp_path / "edited", tmp_path / "wanted")
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    PeftModel.from_pretrained(zoo.base("llama"), tmp_path / "edited")


def test_zero_mass_changes_nothing(zoo: Zoo, tmp_path: Path) -> None:
    source, base = saved(zoo, "dense", tmp_path / "mixture"), base_without_weights(zoo, tmp_path / "base")
    extra = zoo.adapter("llama", "extra", NEW)
    where = ["--out", str(tmp_path / "out"), "--base", base]
    run("add-expert", str(source), "fourth", extra, "--init", "zero", *where)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        one, other = (
            PeftModel.from_pretrained(zoo.base("llama"), folder).eval()(input_ids=ids).logits
            for folder in (source, tmp_path / "out")
        )
    # The sums run over more ranks, in another order of additions: a few units in the last place of float32.
    torch.testing.assert_close(other, one, atol=1e-5, rtol=0)


def test_refusals_write_nothing(zoo: Zoo, tmp_path: Path) -> None:
    source, base = saved(zoo, "dense", tmp_path / "mixture"), base_without_weights(zoo, tmp_path / "base")
    out = tmp_path / "out"
    with pytest.raises(PeftMoeError, match="lww"):
        run("remove-expert", str(source), "lww", "--out", str(out), "--base", base)
    assert not out.exists()
    with pytest.raises(PeftMoeError, match="overlap"):
        run("remove-expert", str(source), "second", "--out", str(source), "--base", base)
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(PeftMoeError, match="not empty"):
        run("remove-expert", str(source), "second", "--out", str(out), "--base", base)
    with pytest.raises(PeftMoeError, match="there is no folder"):
        run(
            "remove-expert",
            str(source),
            "second",
            "--out",
            str(tmp_path / "new"),
            "--base",
            str(tmp_path / "x"),
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "mixture", "out"]


def test_the_tokenizer_comes_along(zoo: Zoo, tmp_path: Path) -> None:
    source, base = saved(zoo, "dense", tmp_path / "mixture"), base_without_weights(zoo, tmp_path / "base")
    (source / "tokenizer.json").write_text("{}")
    first = PeftModel.from_pretrained(zoo.base("llama"), source).peft_config["default"].expert_names[0]
    run("remove-expert", str(source), first, "--out", str(tmp_path / "out"), "--base", base)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
