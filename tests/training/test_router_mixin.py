"""Training a router with TRL: which labels arrive, what trains, what is logged, saved and resumed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from support.bases import HIDDEN
from support.batches import IGNORE
from support.routing import routers
from support.training import (
    DOMAINS,
    make_trainer,
    router_values,
    samples,
    tokenised,
    tokenizer,
)
from support.zoo import Zoo

from peft_moe import MoLoraConfig, PeftMoeError

LABELS = {"router_label_loss_coef": 1.0}
ALL_LOSSES = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.2, **LABELS}


def raw(count: int = 8, **columns: Any) -> Dataset:
    """Text, as a user has it: prompt, completion, domain."""
    return Dataset.from_list([row | columns for row in samples(count)])


def log_of(trainer: Any, key: str) -> dict[str, float]:
    return next(entry for entry in trainer.state.log_history if key in entry)


# -- labels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("routing", "elsewhere"), [("prompt-probe", 3), ("top2", -1)], ids=["null expert", "no null expert"]
)
def test_each_sample_brings_its_domain_to_the_loss(
    zoo: Zoo, tmp_path: Path, routing: str, elsewhere: int
) -> None:
    rows = samples(8)
    rows[5]["domain"] = None  # unknown: skipped by the loss in either case
    expected = {
        row["prompt"]: -1 if row["domain"] is None else [0, 1, 2, elsewhere][DOMAINS.index(row["domain"])]
        for row in rows
    }
    model = zoo.mixture("llama", routing, **LABELS)
    trainer = make_trainer("sft", model, Dataset.from_list(rows), tmp_path, max_steps=2)
    seen: dict[str, int] = {}
    compute_loss = trainer.compute_loss

    def spy(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        prompts = (inputs["labels"] == IGNORE) & inputs["attention_mask"].bool()
        for ids, prompt, domain in zip(inputs["input_ids"], prompts, inputs["domain_index"], strict=True):
            seen["".join(tokenizer().convert_ids_to_tokens(ids[prompt]))] = int(domain)
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = spy
    trainer.train()
    assert seen == expected


def test_the_label_loss_is_never_silently_off(zoo: Zoo, tmp_path: Path) -> None:
    def construct(data: Any, **settings: Any) -> Any:
        return make_trainer("sft", zoo.mixture("llama", "prompt-probe", **LABELS), data, tmp_path, **settings)

    with pytest.raises(PeftMoeError, match=r"needs a `domain` column.*the dataset has"):
        construct(raw().remove_columns("domain"))
    with pytest.raises(PeftMoeError, match="domains of packed samples; set packing=False"):
        construct(raw(), packing=True, max_length=64)
    with pytest.raises(PeftMoeError, match=r"domains of packed samples.*padding_free=False"):
        construct(raw(), padding_free=True)
    with pytest.raises(PeftMoeError, match=r"one is 'wides'.*Did you mean 'wide'"):
        construct(raw(domain="wides"))
    with pytest.warns(UserWarning, match=r"without a sample of their domain: \['narrow', 'upper'\]"):
        construct(raw(domain="wide"))
    # A stream of unknown columns tells them only when it is read.
    rows = list(tokenised(samples(8)).remove_columns("domain"))
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(PeftMoeError, match="needs a `domain` for each sample"):
        make_trainer("plain", zoo.mixture("llama", "prompt-probe", **LABELS), stream, tmp_path).train()


def test_held_out_data_may_lack_labels(zoo: Zoo, tmp_path: Path) -> None:
    model = zoo.mixture("llama", "prompt-probe", router_z_loss_coef=0.1, **LABELS)
    given = {"eval_dataset": raw().remove_columns("domain")}
    metrics = make_trainer("sft", model, raw(), tmp_path, given=given).evaluate()
    assert "eval_router_z_loss" in metrics
    assert "eval_router_label_loss" not in metrics  # a zero would look like a perfect router


# -- what trains -------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ["top2", "block", "prompt-probe"])
def test_only_routers_train(zoo: Zoo, tmp_path: Path, routing: str) -> None:
    model = zoo.mixture("llama", routing)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer("sft", model, raw(), tmp_path, max_steps=2)
    trainer.train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    of_routers = {name for name in before if ".molora_router." in name}
    assert moved == of_routers
    assert {name for name, p in model.named_parameters() if p.requires_grad} == of_routers
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for _, r in routers(model) for p in r.parameters()}


def test_wrong_trainable_sets_are_refused(zoo: Zoo, tmp_path: Path) -> None:
    def construct(model: Any) -> Any:
        return make_trainer("sft", model, raw(), tmp_path)

    late = construct(zoo.mixture("llama", "top2"))
    next(p for name, p in late.model.named_parameters() if "molora_B" in name).requires_grad_(True)
    with pytest.raises(PeftMoeError, match=r"1 parameters would train that should be frozen.*molora_B"):
        late.train()
    with pytest.raises(PeftMoeError, match="molora_B"):
        construct(late.model)
    base_thawed = zoo.mixture("llama", "top2")
    base_thawed.get_base_model().lm_head.requires_grad_(True)
    with pytest.raises(PeftMoeError, match=r"should be frozen, such as .*lm_head\.weight"):
        construct(base_thawed)
    with pytest.raises(PeftMoeError, match="router='uniform' has nothing to train"):
        construct(zoo.mixture("llama", "uniform"))
    with pytest.raises(PeftMoeError, match="carries no active mixture; pass peft_config=MoLoraConfig"):
        construct(zoo.base("llama"))
    asked_for = construct(zoo.mixture("llama", "top2", train_experts=True))
    assert any("molora_B" in n for n, p in asked_for.model.named_parameters() if p.requires_grad)


def test_a_learning_rate_of_adapters_is_called_slow(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="learning_rate=0.0001 hardly moves a router"):
        make_trainer("sft", zoo.mixture("llama", "top2"), raw(), tmp_path, learning_rate=1e-4).train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*hardly moves")
        make_trainer("sft", zoo.mixture("llama", "top2"), raw(), tmp_path).train()


# -- logs, saving, resuming --------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_logged_loss_is_the_sum_of_its_logged_parts(zoo: Zoo, tmp_path: Path, accumulation: int) -> None:
    sizes = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    logs = []
    for losses in ({}, ALL_LOSSES):
        trainer = make_trainer("sft", zoo.mixture("llama", "top2", **losses), raw(4), tmp_path, **sizes)
        trainer.train()
        logs.append(log_of(trainer, "loss"))
    parts = {
        "router_aux_loss_coef": "load_balancing_loss",
        "router_z_loss_coef": "router_z_loss",
        "router_label_loss_coef": "router_label_loss",
    }
    extra = sum(ALL_LOSSES[field] * logs[1][name] for field, name in parts.items())
    assert extra > 1
    assert logs[1]["loss"] - logs[0]["loss"] == pytest.approx(extra, abs=1e-4)  # logged with 5 digits or more
    assert set(parts.values()).isdisjoint(logs[0])
    load = [logs[1][f"load/{name}"] for name in ("wide", "narrow", "upper")]
    assert sum(load) == pytest.approx(1.0, abs=1e-5)
    assert 0 < logs[1]["router_entropy"] < 1


def test_labels_and_loads_with_an_expert_that_is_always_on(zoo: Zoo, tmp_path: Path) -> None:
    """It has no column: samples of its domain belong to no routed expert, hence to the null expert."""
    fields = {"shared_experts": ["narrow"], "null_expert": True, **LABELS}
    model = zoo.mixture("llama", "dense", **fields)
    trainer = make_trainer("sft", model, raw(8), tmp_path, max_steps=30, learning_rate=3e-2)
    collated = trainer.data_collator([{"input_ids": [3], "labels": [3], "domain": d} for d in DOMAINS])
    assert collated["domain_index"].tolist() == [0, 2, 1, 2]  # wide, narrow, upper, weather
    trainer.train()
    logs = [e for e in trainer.state.log_history if "loss" in e]
    assert logs[-1]["router_label_loss"] < 0.8 * logs[0]["router_label_loss"]
    assert logs[-1]["load/narrow"] == 1
    assert sum(logs[-1][f"load/{n}"] for n in ("wide", "upper", "null")) == pytest.approx(1, abs=1e-5)


def test_from_a_path_with_a_config(zoo: Zoo, tmp_path: Path) -> None:
    base = tmp_path / "base"
    zoo.base("llama").save_pretrained(base)
    tokenizer().save_pretrained(base)
    config = MoLoraConfig(
        experts=zoo.experts("llama"),
        router="context",
        task_type="CAUSAL_LM",
        **LABELS,
        router_z_loss_coef=0.1,
    )
    given = {"peft_config": config, "eval_dataset": {"one": raw(4), "two": raw(8)}, "processing_class": None}
    settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer("sft", str(base), raw(), tmp_path / "out", given=given, **settings)
    assert router_values(trainer.model).dtype == torch.float32
    assert len(router_values(trainer.model)) == 4 * HIDDEN + 4  # three experts, the null expert
    trainer.train()
    routing = ["load/wide", "load/narrow", "load/upper", "load/null", "router_entropy"]
    keys = [*routing, "router_z_loss", "router_label_loss", "loss"]
    for prefix in ("", "eval_one_", "eval_two_"):
        logged = log_of(trainer, prefix + "loss")
        assert {prefix + key for key in keys} <= set(logged)
        assert sum(logged[f"{prefix}load/{name}"] for name in ("wide", "narrow", "upper", "null")) == (
            pytest.approx(1.0, abs=1e-5)
        )
    assert not any(key.startswith("eval_load") for entry in trainer.state.log_history for key in entry)


@pytest.mark.parametrize("fields", [{"routing": "top2"}, {"routing": "prompt-probe", **LABELS}])
def test_resuming_is_exact_to_the_bit(zoo: Zoo, tmp_path: Path, fields: dict[str, Any]) -> None:
    """Six steps are three, a checkpoint, and three more in a mixture that began with another router."""
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear"}
    straight = make_trainer("sft", zoo.mixture("llama", **fields), raw(), tmp_path, **settings)
    straight.train()
    checkpoint = tmp_path / "checkpoint-3"
    resumed = make_trainer(
        "sft", zoo.mixture("llama", seed=7, **fields), raw(), tmp_path / "again", **settings
    )
    resumed.train(resume_from_checkpoint=str(checkpoint))
    three = make_trainer("sft", zoo.mixture("llama", **fields), raw(), tmp_path / "x", max_steps=3)
    assert not torch.equal(router_values(three.model), router_values(straight.model))
    assert [e["step"] for e in resumed.state.log_history if "loss" in e] == [1, 2, 3, 4, 5, 6]
    assert straight.state.log_history[:6][-1]["loss"] == resumed.state.log_history[:6][-1]["loss"]
    for (name, ours), (_, theirs) in zip(
        resumed.model.state_dict().items(), straight.model.state_dict().items(), strict=True
    ):
        assert torch.equal(ours, theirs), name


# -- what a router that decides per prompt may see ---------------------------------------------------


def decisions(zoo: Zoo, folder: Path, data: Dataset, **settings: Any) -> list[torch.Tensor]:
    """Scores of every pass of one training step, sorted by row: the trainer shuffles."""
    model = zoo.mixture("llama", "prompt-probe")
    seen: list[torch.Tensor] = []
    next(routers(model))[1].register_forward_hook(
        lambda module, args, routing: seen.append(routing.logits.detach()[:, 0].sort(dim=0).values)
    )
    make_trainer("sft", model, data, folder, **settings).train()
    return seen


def test_the_completion_does_not_reach_the_decision(zoo: Zoo, tmp_path: Path) -> None:
    rows = samples(4)
    other = [{**row, "completion": "zz" + row["completion"][::-1] + "qq"} for row in rows]
    prompts = [{**row, "prompt": "zz" + row["prompt"]} for row in rows]
    plain = decisions(zoo, tmp_path, Dataset.from_list(rows))
    assert len(plain) == 1
    # Rows are padded to other lengths: float32 noise, while another prompt moves scores by 1e-2 and more.
    torch.testing.assert_close(
        decisions(zoo, tmp_path, Dataset.from_list(other))[0], plain[0], atol=1e-5, rtol=0
    )
    moved = decisions(zoo, tmp_path, Dataset.from_list(prompts))[0]
    assert (moved - plain[0]).abs().max() > 1e-2
    # TRL keeps the labels, hence the prompt's end, from a pass whose logits it smooths.
    smoothed = decisions(zoo, tmp_path, Dataset.from_list(rows), label_smoothing_factor=0.1)
    assert len(smoothed) == 2
    for one in smoothed:
        torch.testing.assert_close(one, plain[0], atol=1e-5, rtol=0)


def test_plain_text_is_refused_where_a_prompt_is_needed(zoo: Zoo, tmp_path: Path) -> None:
    text = Dataset.from_list([{"text": row["prompt"] + row["completion"]} for row in samples(4)])
    trainer = make_trainer("sft", zoo.mixture("llama", "prompt-probe"), text, tmp_path)
    with pytest.raises(PeftMoeError, match="use prompt/completion data, or router_granularity='token'"):
        trainer.train()
    make_trainer("sft", zoo.mixture("llama", "token-probe"), text, tmp_path).train()
