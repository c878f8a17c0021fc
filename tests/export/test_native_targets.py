"""Adding a native export target is one file: a made-up architecture, registered and written here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.adapters import Recipe
from support.zoo import Zoo
from transformers import MixtralConfig

from peft_moe import PeftMoeError
from peft_moe.export import export, export_kinds
from peft_moe.export.native import target as target_module
from peft_moe.export.native.target import Layout, NativeTarget, native_targets, register_target

RECIPES = {"a": Recipe("mlp", 11, {"r": 4}), "b": Recipe("mlp", 12, {"r": 3})}


class MadeUpConfig(MixtralConfig):
    """A config of its own model type."""

    model_type = "made_up_moe"


class MadeUpTarget(NativeTarget):
    """Mixtral's arithmetic under names that no other target has."""

    name = "made-up"
    title = "Made-Up-MoE"
    base_types = ("llama",)
    config_class = MadeUpConfig
    architecture = "MadeUpForCausalLM"
    experts_module = "mixer"
    linears = ("first", "second", "third")
    unmixed_layers = False

    def config_fields(self, layout: Layout) -> dict[str, Any]:
        """Return Mixtral's number of experts."""
        return {**super().config_fields(layout), "num_local_experts": layout.experts}


@pytest.fixture
def made_up() -> Iterator[None]:
    native_targets()  # the package's own come first
    register_target(MadeUpTarget)
    yield
    target_module._TARGETS.pop("made-up", None)


def saved_mixture(zoo: Zoo, folder: Path) -> str:
    experts = {name: zoo.adapter("llama", f"ffn-{name}", recipe) for name, recipe in RECIPES.items()}
    model = zoo.mixture("llama", experts=experts, mixing="block", router="gate")
    model.save_pretrained(folder)
    return str(folder)


def test_the_three_targets_are_files_of_their_own() -> None:
    assert {"mixtral", "qwen2-moe", "qwen3-moe"} <= set(native_targets())
    files = {type(target).__module__.rpartition(".")[2] for target in native_targets().values()}
    assert {"mixtral", "qwen2_moe", "qwen3_moe"} <= files


@pytest.mark.usefixtures("made_up")
def test_a_new_target_is_written_under_its_names(zoo: Zoo, tmp_path: Path) -> None:
    mixture = saved_mixture(zoo, tmp_path / "mixture")
    base = zoo.saved_base("llama")
    assert "made-up" in export_kinds()
    report = export(mixture, tmp_path / "made-up", to="made-up", base=base)
    export(mixture, tmp_path / "mixtral", to="mixtral", base=base)
    config = json.loads((tmp_path / "made-up" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("made_up_moe", ["MadeUpForCausalLM"])
    assert report.kind == "made-up"
    names = {"w1": "first", "w3": "second", "w2": "third", "block_sparse_moe": "mixer"}
    ours = load_file(tmp_path / "made-up" / "model.safetensors")
    theirs = load_file(tmp_path / "mixtral" / "model.safetensors")
    renamed = {".".join(names.get(part, part) for part in key.split(".")): t for key, t in theirs.items()}
    assert set(ours) == set(renamed)
    assert any(".mixer.experts.0.first.weight" in key for key in ours)
    assert all(torch.equal(ours[key], renamed[key]) for key in ours)


@pytest.mark.usefixtures("made_up")
def test_native_still_means_the_first_target_of_a_base(zoo: Zoo, tmp_path: Path) -> None:
    report = export(
        saved_mixture(zoo, tmp_path / "mixture"), tmp_path / "out", to="native", base=zoo.saved_base("llama")
    )
    assert report.kind == "mixtral"


@pytest.mark.usefixtures("made_up")
def test_a_taken_name_and_an_unknown_one_are_refused(zoo: Zoo, tmp_path: Path) -> None:
    class Other(MadeUpTarget):
        """Another class under the same name."""

    with pytest.raises(PeftMoeError, match="native target 'made-up' is registered as MadeUpTarget"):
        register_target(Other)
    with pytest.raises(PeftMoeError, match=r"to='maid-up' is not known.*Did you mean 'made-up'"):
        export(saved_mixture(zoo, tmp_path / "mixture"), tmp_path / "out", to="maid-up")
