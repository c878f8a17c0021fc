"""The steps of CONTRIBUTING.md, followed literally: its code runs, and does what the page says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import Recipe
from support.mixtures import draw_mixture
from support.training import make_trainer, samples, tokenised
from support.zoo import Zoo

from peft_moe import MoLoraConfig
from peft_moe.export import export
from peft_moe.export.native import target as targets
from peft_moe.export.native.target import native_targets
from peft_moe.ops import BACKENDS, mix
from peft_moe.routers.losses import LOSSES

REPO = Path(__file__).parents[2]
PAGE = (REPO / "CONTRIBUTING.md").read_text()
KINDS = ("router", "loss", "backend", "target")


def code_of(kind: str) -> str:
    """All code blocks of one section, in their order."""
    blocks = re.findall(rf"```python {kind}\n(.*?)```", PAGE, re.DOTALL)
    assert blocks, f"CONTRIBUTING.md has no code for a {kind}"
    return "\n".join(blocks)


def follow(kind: str) -> None:
    """Run the code of one section as a module of its own."""
    exec(compile(code_of(kind), f"CONTRIBUTING.md ({kind})", "exec"), {"__name__": f"contributed_{kind}"})


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """Everything that the page registers is taken out again; scorers are, by the fixture of all tests."""
    native_targets()
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (registry, dict(registry)) for registry in (LOSSES, BACKENDS, targets._TARGETS)
    ]
    yield
    for registry, before in kept:
        registry.clear()
        registry.update(before)


def test_every_section_has_its_code() -> None:
    assert sorted(set(re.findall(r"```python (\w+)\n", PAGE))) == sorted(KINDS)
    assert "```python\n" not in PAGE, "a block without a kind would not be run"


def test_the_paths_exist() -> None:
    paths = re.findall(r"`((?:peft_moe|tests|benchmarks|docs)/[\w./]*)`", PAGE)
    assert paths
    assert [path for path in paths if not (REPO / path).exists()] == []


def test_a_router_passes_the_check_and_is_found() -> None:
    follow("router")  # check_router raises where it does not
    assert MoLoraConfig(experts=3, router="two_layers").router == "two_layers"


def test_a_loss_is_added_and_logged(zoo: Zoo, tmp_path: Path) -> None:
    follow("loss")
    model = zoo.mixture("llama", "top2", loss_coefs={"peak": 0.1})
    trainer = make_trainer("sft", model, tokenised(samples(8)), tmp_path, max_steps=1, logging_steps=1)
    trainer.train()
    logged = [entry["peak_loss"] for entry in trainer.state.log_history if "peak_loss" in entry]
    assert logged
    assert all(0 < value <= 1 for value in logged)


def test_a_backend_computes_the_definition() -> None:
    follow("backend")
    drawn = draw_mixture(7, 12, 9, (3, 4, 2), 2)
    tensors = (drawn.x, drawn.a, drawn.b, drawn.dense, drawn.ranks, drawn.base)
    ours = mix(*tensors, backend="plain")
    torch.testing.assert_close(ours, mix(*tensors, backend="stacked"), atol=1e-5, rtol=1e-5)
    assert MoLoraConfig(experts=2, backend="plain").backend == "plain"


def test_an_export_target_writes_a_folder(zoo: Zoo, tmp_path: Path) -> None:
    follow("target")
    recipes = {"a": Recipe("mlp", 11, {"r": 4}), "b": Recipe("mlp", 12, {"r": 3})}
    experts = {name: zoo.adapter("llama", f"ffn-{name}", recipe) for name, recipe in recipes.items()}
    zoo.mixture("llama", experts=experts, mixing="block", router="gate").save_pretrained(tmp_path / "mixture")
    report = export(str(tmp_path / "mixture"), tmp_path / "moe", to="twin", base=zoo.saved_base("llama"))
    assert report.kind == "twin"
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["num_local_experts"] == 2
