"""Joint and staged training: equal shares of domains, who trains, what is forgotten, the recipe itself."""

from __future__ import annotations

import json
import runpy
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from peft import LoraConfig
from support.training import DOMAINS, make_trainer, router_values, samples, tokenised, tokenizer
from support.zoo import Zoo
from torch.utils.data import BatchSampler, DataLoader

from peft_moe import PeftMoeError
from peft_moe.evaluation.forgetting import ForgettingReport
from peft_moe.training.data.balanced_sampler import BalancedSampler, balanced_sampler
from peft_moe.training.stages import set_stage, write_fresh_experts

ROOT = Path(__file__).parents[2]
UNEQUAL = ["a"] * 3 + ["b"] * 20 + ["c"] * 7


def arguments(**changes: Any) -> Any:
    known = {"gradient_accumulation_steps": 1, "world_size": 1, "packing": False}
    return SimpleNamespace(
        **known | {"train_sampling_strategy": "random", "accelerator_config": None} | changes
    )


# -- balanced batches --------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("batch", [6, 4])
def test_equal_shares_in_every_step_of_every_process(batch: int, processes: int) -> None:
    """Batches of 6 hold two of each domain; batches of 4 do over a step of three batches."""
    accumulation = 1 if batch == 6 else 3
    sampler = BalancedSampler(UNEQUAL, batch * accumulation * processes, seed=0)
    batches = BatchSampler(sampler, batch, drop_last=False)
    shards = [list(BatchSamplerShard(batches, processes, index)) for index in range(processes)]
    assert len({len(shard) for shard in shards}) == 1
    steps = len(shards[0]) // accumulation
    assert steps * accumulation == len(shards[0])
    for step in range(steps):
        own = [b for shard in shards for b in shard[step * accumulation : (step + 1) * accumulation]]
        assert all(len(one) == batch for one in own)
        counts = Counter(UNEQUAL[row] for one in own for row in one)
        assert len(counts) == 3
        assert len(set(counts.values())) == 1
        if batch == 6:
            assert all(Counter(UNEQUAL[row] for row in one) == dict.fromkeys("abc", 2) for one in own)
    drawn = Counter(row for shard in shards for one in shard for row in one)
    assert set(drawn) == set(range(len(UNEQUAL)))  # every row comes
    for name in "abc":
        times = [count for row, count in drawn.items() if UNEQUAL[row] == name]
        assert max(times) - min(times) <= 1


def test_the_order_follows_from_seed_and_epoch() -> None:
    done = 0
    sampler = BalancedSampler(UNEQUAL, 6, seed=0, step=lambda: done)
    first = list(sampler)
    assert list(sampler) == first == list(BalancedSampler(UNEQUAL, 6, seed=0))
    assert first != list(BalancedSampler(UNEQUAL, 6, seed=1))
    done = sampler.steps - 1  # the last step of the first epoch, as after a resume
    assert list(sampler) == first
    done = sampler.steps
    second = list(sampler)
    assert second != first
    loader = DataLoader(range(len(UNEQUAL)), batch_size=6, sampler=sampler)  # type: ignore[arg-type]
    assert torch.cat(list(skip_first_batches(loader, 2))).tolist() == second[12:]


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        ({"text": ["x"]}, {}, r"needs a `domain` column; the dataset has \['text'\]"),
        ({"domain": ["a", None]}, {}, "a sample has None"),
        ({"domain": [["a", "b"]]}, {}, "switching_share"),
        ({"domain": ["a", "b", "c"]}, {}, r"4 \(batch\) × 1 .* = 4 samples cannot hold equal shares of 3"),
        ({"domain": ["a", "b"]}, {"packing": True}, "packed samples"),
        ({"domain": ["a"]}, {"train_sampling_strategy": "group_by_length"}, "group_by_length"),
    ],
)
def test_data_that_cannot_be_balanced(data: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PeftMoeError, match=message):
        balanced_sampler(Dataset.from_dict(data), arguments(**changes), 4, seed=0)
    with pytest.raises(PeftMoeError, match="not a stream"):
        balanced_sampler(iter([]), arguments(), 4, seed=0)


def test_balanced_training_bites_and_resumes_to_the_bit(zoo: Zoo, tmp_path: Path) -> None:
    rows = [row for index, row in enumerate(samples(24)) if row["domain"] == "wide" or index < 8]
    data = tokenised(rows)  # 6 of wide, 2 of each other domain: an epoch is 6 steps

    def run(name: str, balanced: bool, resume: str | None = None) -> Any:
        model = zoo.mixture("llama", "prompt-soft", router_label_loss_coef=1.0)
        more = {"max_steps": 8, "save_strategy": "steps", "save_steps": 7, "learning_rate": 3e-2}
        given = {"balanced_domains": balanced}
        trainer = make_trainer("sft", model, data, tmp_path / name, given=given, **more)
        seen: list[Counter[str]] = []
        collate = trainer.data_collator.__call__

        def looked_at(examples: list[dict[str, Any]]) -> Any:
            seen.append(Counter(example["domain"] for example in examples))
            return collate(examples)

        trainer.data_collator = looked_at
        trainer.train(resume_from_checkpoint=resume)
        return trainer, seen

    straight, seen = run("straight", True)
    assert all(batch == dict.fromkeys(DOMAINS, 1) for batch in seen)
    assert len(seen) >= 8
    plain, others = run("plain", False)
    assert any(batch != dict.fromkeys(DOMAINS, 1) for batch in others)
    assert not torch.equal(router_values(plain.model), router_values(straight.model))
    # Step 8 lies in the second epoch.
    resumed, _ = run("resumed", True, str(tmp_path / "straight" / "checkpoint-7"))
    assert torch.equal(router_values(resumed.model), router_values(straight.model))


def test_a_trainer_refuses_before_it_trains(zoo: Zoo, tmp_path: Path) -> None:
    model = zoo.mixture("llama", "top2")
    given = {"balanced_domains": True}
    with pytest.raises(PeftMoeError, match="cannot hold equal shares of 4 domains"):
        make_trainer(
            "sft", model, tokenised(samples(8)), tmp_path, given=given, per_device_train_batch_size=3
        )


# -- stages ------------------------------------------------------------------------------------------


def test_who_trains_in_a_stage(zoo: Zoo) -> None:
    model = zoo.mixture("llama", "top2", shared_experts=["upper"])
    config = model.peft_config["default"]

    def router_trains() -> bool:
        return any(p.requires_grad for n, p in model.named_parameters() if "molora_router" in n)

    assert set_stage(model, ["wide"], "own") == ["wide"]
    assert (config.trains, router_trains()) == ([True, False, False], False)
    assert set_stage(model, ["narrow"], "own_and_shared") == ["narrow", "upper"]
    assert (config.trains, router_trains()) == ([False, True, True], False)
    assert set_stage(model, ["wide"], "all") == ["wide", "narrow", "upper"]
    assert (config.trains, router_trains()) == ([True] * 3, True)
    with pytest.raises(PeftMoeError, match=r"trains='owm' is not one of .*Did you mean"):
        set_stage(model, ["wide"], "owm")
    with pytest.raises(PeftMoeError, match="domain 'upper' has no routed expert"):
        set_stage(model, ["upper"], "own")


def test_fresh_experts_begin_as_the_base_each_with_its_own_draw(zoo: Zoo, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base = zoo.base("llama")
    names = list(base.state_dict())
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    given = {"old": zoo.experts("llama")["wide"], "one": None, "two": None}
    found = write_fresh_experts(base, given, lora, tmp_path, seed=3)
    assert list(found) == list(given)
    assert list(base.state_dict()) == names
    one, two = (load_file(Path(found[n]) / "adapter_model.safetensors") for n in ("one", "two"))
    for key, value in one.items():
        assert torch.equal(value, two[key]) == ("lora_B" in key)
        assert value.any() == ("lora_A" in key)
    with pytest.raises(PeftMoeError, match="need lora_target_modules"):
        write_fresh_experts(base, {"x": None}, LoraConfig(r=2), tmp_path, seed=0)
    with pytest.raises(PeftMoeError, match="experts is empty"):
        write_fresh_experts(base, {}, lora, tmp_path, seed=0)


def test_forgetting_by_hand(tmp_path: Path) -> None:
    report = ForgettingReport({"a": 4.0, "b": 5.0, "c": 6.0})
    report.add_stage("a", ["a"], {"a": 2.0, "b": 5.5, "c": 6.0})
    assert report.forgetting() == {"a": 0.0}
    assert report.backward_transfer() is None
    report.add_stage("b", ["b"], {"a": 1.5, "b": 3.0, "c": 6.0})
    assert report.backward_transfer() == pytest.approx(0.5)  # learning b helped a
    report.add_stage("c", ["c"], {"a": 2.5, "b": 3.5, "c": 1.0})
    assert report.forgetting() == {"a": 1.0, "b": 0.5, "c": 0.0}
    assert report.backward_transfer() == pytest.approx(((2.0 - 2.5) + (3.0 - 3.5)) / 2)
    assert report.backward_transfer(1) == pytest.approx(0.5)
    lines = report.table().splitlines()
    assert lines[-2].startswith("c ")
    assert lines[-2].endswith("-0.500")
    assert "1.000*" in lines[-2]
    assert lines[-1].split() == ["forgot", "+1.000", "+0.500", "+0.000"]
    report.save(tmp_path)
    saved = json.loads((tmp_path / "forgetting.json").read_text())
    assert saved["stages"][2]["forgetting"] == {"a": 1.0, "b": 0.5, "c": 0.0}
    assert (tmp_path / "forgetting.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["forgetting.json", "forgetting.png"]
    with pytest.raises(PeftMoeError, match="measure the same domains"):
        report.add_stage("d", ["a"], {"a": 1.0})
    with pytest.raises(PeftMoeError, match=r"learnt \['z'\]"):
        report.add_stage("d", ["z"], {"a": 1.0, "b": 1.0, "c": 1.0})


# -- the recipe --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("modular")
    zoo.base("llama").save_pretrained(path / "base")
    tokenizer().save_pretrained(path / "base")
    for domain in ("wide", "narrow"):
        rows = [row for row in samples(80) if row["domain"] == domain]
        rows = [{**row, "completion": "abab" if domain == "wide" else "zyzy"} for row in rows]
        if domain == "narrow":  # so that prompts tell the domains apart
            rows = [{**row, "prompt": "".join(str(ord(c) % 10) for c in row["prompt"])} for row in rows]
        (path / f"{domain}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, shipped: str, **changes: Any) -> Any:
    settings = yaml.safe_load((ROOT / "recipes" / "configs" / f"{shipped}.yaml").read_text())
    settings |= {
        "model_name_or_path": str(folder / "base"),
        "experts": {"wide": None, "narrow": None},
        "train_files": {d: str(folder / f"{d}.jsonl") for d in ("wide", "narrow")},
        "output_dir": str(folder / name),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 3e-2,
        "disable_tqdm": True,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings | changes))
    script = str(ROOT / "recipes" / "train_modular.py")
    monkeypatch.setattr(sys, "argv", [script, "--config", str(folder / f"{name}.yaml")])
    runpy.run_path(script, run_name="__main__")
    return json.loads((folder / name / "forgetting.json").read_text())


def test_joint_training_with_a_common_expert_and_a_teacher(
    zoo: Zoo, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joint = run(monkeypatch, folder, "joint", "demo_jeet")
    (stage,) = joint["stages"]
    assert all(stage["losses"][d] < joint["before"][d] for d in joint["before"])
    experts = {"wide": None, "narrow": None, "common": None}
    common = run(monkeypatch, folder, "common", "demo_moe_ce", experts=experts)
    assert common["before"] == joint["before"]  # fresh experts begin as the base
    assert common["stages"] != joint["stages"]
    found = []
    for name, adaptive in (("fixed", False), ("adaptive", True)):
        mixture = {"router": "classifier", "distillation_coef": 1.0, "distillation_adaptive": adaptive}
        teacher = str(folder / "joint")
        found.append(run(monkeypatch, folder, name, "demo_distil", mixture=mixture, teacher=teacher))
    assert found[0]["stages"] != found[1]["stages"] != joint["stages"]


def test_stages_of_own_experts_forget_nothing_and_shared_parts_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = run(monkeypatch, folder, "own", "demo_stages", stages=["wide", "narrow"])
    first, second = own["stages"]
    assert first["losses"]["wide"] < own["before"]["wide"]
    assert second["losses"]["narrow"] < first["losses"]["narrow"] == own["before"]["narrow"]
    assert second["losses"]["wide"] == first["losses"]["wide"]  # to the bit: it was frozen
    assert second["forgetting"] == {"wide": 0.0, "narrow": 0.0}
    assert "Stage narrow: narrow train\n" in capsys.readouterr().out
    more = {"experts": {"wide": None, "narrow": None, "common": None}, "trains": "own_and_shared"}
    more["mixture"] = {"router": "classifier", "shared_experts": ["common"]}
    shared = run(monkeypatch, folder, "shared", "demo_stages", stages=["wide", "narrow"], **more)
    assert shared["stages"][1]["losses"]["wide"] != shared["stages"][0]["losses"]["wide"]
    assert shared["stages"][1]["backward_transfer"] != 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ["wide", "narow"]}, "'narow' is no domain of train_files.*Did you mean"),
        ({"trains": "owm"}, "trains='owm' is not one of"),
        ({"teacher": "somewhere"}, "has no effect; set mixture: distillation_coef"),
        ({"mixture": {"rooter": "x"}}, "'rooter' is not a field of MoLoraConfig"),
        ({"eval_fraction": 1.0}, "leave none to train on"),
        ({"lora_target_modules": None}, "need lora_target_modules"),
        ({"resume_from_checkpoint": "last"}, "does not resume"),
    ],
)
def test_refusals(
    folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PeftMoeError, match=message):
        run(monkeypatch, folder, "refused", "demo_stages", **{"stages": ["wide"]} | changes)
