"""A tiny bake-off through the command line, on three of the demo's experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor
from typer.testing import CliRunner, Result

from peft_moe import PeftMoeError, Scorer
from peft_moe.cli.demo import BASE_NAME, asset_path
from peft_moe.cli.demo.skills import BASE_SKILLS_HELD_OUT, BASE_SKILLS_SEEN, generate, write_jsonl
from peft_moe.cli.main import app
from peft_moe.evaluation.bakeoff.methods import method_from
from peft_moe.routers import scorer as registry

# One with rank-stabilised scaling first, ranks 8 and 16, one that adapts attention only.
EXPERTS = ("date", "reverse", "query")
METHODS = (
    "uniform,merge-cat-mean,merge-linear,context-fitted,linear,peft-xlora,one-wide-lora,wide-lora-same-steps"
)
WIDE = {"one-wide-lora", "wide-lora-same-steps"}
SCORED = {"uniform", "merge-cat-mean", "context-fitted", "linear", "peft-xlora", *WIDE}


class Broken(Scorer):
    """Fails as a bug would."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no such luck")


def bake(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(
        app, ["bakeoff", str(folder / "bakeoff.yaml"), "--out", str(folder / "out"), *arguments]
    )


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "results.json").read_text())


def stamps(folder: Path) -> dict[str, int]:
    return {path.stem: path.stat().st_mtime_ns for path in (folder / "out" / "scores").iterdir()}


def losses(folder: Path, method: str) -> list[float]:
    data = json.loads((folder / "out" / "scores" / f"{method}.json").read_text())
    return [turn[0] for texts in data["scores"].values() for turns in texts for turn in turns]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bakeoff")
    skills = {name: [name] for name in EXPERTS} | {
        "known": BASE_SKILLS_SEEN[:3],
        "new": BASE_SKILLS_HELD_OUT[:3],
    }
    for domain, names in skills.items():
        (root / "data" / domain).mkdir(parents=True)
        for split in ("train", "test"):
            samples = [s for name in names for s in generate(name, 6, 0, split)]
            write_jsonl(root / "data" / domain / f"{split}.jsonl", samples)
    settings = {
        "base": str(asset_path(BASE_NAME)),
        "experts": {name: str(asset_path(f"experts/{name}")) for name in EXPERTS},
        "domains": "data",
        "unseen": ["new"],
        "texts": {"train_records": 6, "test_records": 4, "mixed_per_pair": 1},
        "train": {"steps": 3, "batch_size": 4},
        "width": {"steps": 3, "batch_size": 4},
        "score": {"measures": ["loss", "exact"], "draws": 200},
    }
    (root / "bakeoff.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    done = bake(root, "--only", METHODS)
    assert done.exit_code == 0, done.output
    assert "Recommendation: " in done.output
    return root


def test_every_method_is_measured_or_says_why_not(folder: Path) -> None:
    found = results(folder)
    for measure in ("loss", "exact"):
        assert set(found["measures"][measure]) == {"base", *EXPERTS, "oracle"} | SCORED
    assert found["notes"]["merge-linear"].startswith(
        "not possible: ValueError: All adapters must have the same r"
    )
    assert found["failed"] == []
    assert {p.name for p in (folder / "out").glob("results.*")} == {
        "results.json",
        "results.csv",
        "results.png",
    }
    assert "merge-linear: not possible" in (folder / "out" / "report.txt").read_text()


def test_the_oracle_is_each_domains_own_expert_and_beats_the_base(folder: Path) -> None:
    found = results(folder)["measures"]["loss"]
    for name in EXPERTS:
        value = {method: found[method]["values"][name]["value"] for method in found}
        assert value["oracle"] == value[name] < value["base"]
        assert found["oracle"]["shares"][name]["value"] == 1.0
        assert found["base"]["shares"][name]["value"] == 0.0
    for row in ("known", "new"):
        assert found["oracle"]["changes"][row]["value"] == 0.0
    # Behind the switch the right expert alone does better than the base there.
    value = {method: found[method]["values"]["two domains, running"]["value"] for method in found}
    assert value["oracle"] < value["base"]


def test_pefts_cat_merge_scores_as_the_uniform_mixture(folder: Path) -> None:
    # The demo's adapters are bfloat16. PEFT widens them, the mixture runs in their dtype: 8 bits of mantissa
    # in 42 layers. With float32 adapters the two agree to 1e-5 (tests/evaluation/test_bakeoff_models.py).
    assert losses(folder, "merge-cat-mean-0") == pytest.approx(losses(folder, "uniform-0"), rel=0.03)
    assert losses(folder, "uniform-0") != pytest.approx(losses(folder, "base-0"), rel=0.1)


def test_costs_are_told(folder: Path) -> None:
    cost = {name: one["cost"] for name, one in results(folder)["measures"]["loss"].items()}
    assert cost["uniform"]["trainable"] == cost["merge-cat-mean"]["trainable"] == 0
    assert cost["peft-xlora"]["trainable"] == (192 + 1) * len(EXPERTS)  # a linear classifier of hidden states
    assert cost["context-fitted"]["trainable"] == (192 + 1) * (len(EXPERTS) + 1)  # and one for no expert
    # Rank 8 + 16 + 16 on all linear layers of 6 blocks, 192 wide, 512 in the MLP.
    assert cost["one-wide-lora"]["trainable"] == 40 * 6 * (4 * 2 * 192 + 3 * (192 + 512))
    assert cost["wide-lora-same-steps"]["trainable"] == cost["one-wide-lora"]["trainable"]
    assert losses(folder, "wide-lora-same-steps-0") != losses(folder, "one-wide-lora-0")  # other steps
    assert all(one["tokens_per_second"] > 0 for name, one in cost.items() if name != "oracle")


def test_a_second_run_reuses_everything(folder: Path) -> None:
    before, shares = stamps(folder), results(folder)["measures"]
    done = bake(folder, "--only", METHODS)
    assert done.exit_code == 0
    assert stamps(folder) == before
    assert results(folder)["reused"] == len(before)
    assert results(folder)["measures"] == shares


def test_changed_settings_score_again_what_they_concern_and_nothing_else(folder: Path) -> None:
    before = stamps(folder)
    done = bake(folder, "--only", "uniform,linear", "--set", "train.steps=2", "--set", "seeds=[0, 1]")
    assert done.exit_code == 0
    after = stamps(folder)
    assert {name for name in after if after[name] != before.get(name)} == {
        "linear-0",
        "linear-1",
    }
    found = results(folder)["measures"]["loss"]
    assert found["linear"]["seeds"] == 2
    # Not asked for, but on disk and still valid: shown. X-LoRA had more steps: not shown.
    assert "context-fitted" in found
    assert "peft-xlora" not in found


def test_a_method_that_breaks_is_named_and_the_rest_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        registry._SCORERS, "broken", Broken
    )  # for this test alone: others run over the registry
    (folder / "mine.yaml").write_text(
        "mine: {mixture: {router: broken}}\n"
        "other: {mixture: {router: context}, fit: guesswork}\n"
        "later: {mixture: {router: not_there_yet}}\n"
        "good: {mixture: {router: context, router_granularity: token}, fit: logistic}\n"
    )
    done = bake(folder, "--only", "mine,other,later,good", "--methods-file", str(folder / "mine.yaml"))
    assert done.exit_code == 1
    found = results(folder)
    assert found["notes"]["mine"] == "failed: RuntimeError: no such luck"
    assert "no such luck" in (folder / "out" / "failures" / "mine.txt").read_text()
    assert found["notes"]["other"].startswith("not possible: PeftMoeError: method='guesswork'")
    assert found["notes"]["later"].startswith("skipped: router 'not_there_yet' is not registered")
    assert found["failed"] == ["mine"]
    assert "good" in found["measures"]["loss"]


def test_a_pattern_without_a_method_is_refused(folder: Path) -> None:
    done = bake(folder, "--only", "unifrom")
    assert done.exit_code != 0
    assert "'unifrom' matches no method" in str(done.exception)


@pytest.mark.parametrize(
    "option", [{"generic_share": 0.8}, {"domain_randomisation": 1.0}, {"switching_share": 0.5}]
)
def test_robustness_options_of_a_method_change_what_it_learns(
    folder: Path, tmp_path: Path, option: dict[str, float]
) -> None:
    mixture = {"router": "linear", "null_expert": True, "router_label_loss_coef": 1.0}
    methods = {"plain": {"mixture": mixture, "train": True}, "robust": {"mixture": mixture, "train": option}}
    (tmp_path / "methods.yaml").write_text(yaml.safe_dump(methods))
    done = bake(folder, "--methods-file", str(tmp_path / "methods.yaml"), "--only", "plain,robust")
    assert done.exit_code == 0, done.output
    assert losses(folder, "plain-0") != losses(folder, "robust-0")
    for name in methods:
        (folder / "out" / "scores" / f"{name}-0.json").unlink()


def test_robustness_options_are_for_mixtures() -> None:
    with pytest.raises(PeftMoeError, match="switching_share"):
        method_from("wide", {"width": {}, "train": {"switching_share": 0.5}})
    with pytest.raises(PeftMoeError, match="Did you mean 'switching_share'"):
        method_from("typo", {"mixture": {}, "train": {"switching_shar": 0.5}})
