"""The reference of DPO, KTO and GRPO: the mixture at the start of training, or the base alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.preferences import (
    WITH_REFERENCE,
    batch_of,
    logps,
    make_preference_trainer,
    reference_logps,
    rows_for,
)
from support.routing import routers, set_routers
from support.training import router_values
from support.zoo import Zoo
from torch import nn
from trl import DPOTrainer, GRPOTrainer, KTOTrainer

from peft_moe import MoLoraConfig, PeftMoeError
from peft_moe.training.trainers.reference_model import FILE

PLAIN = {"dpo": DPOTrainer, "kto": KTOTrainer, "grpo": GRPOTrainer}
# Sums of some ten float32 log-probabilities of about 4.
CLOSE = {"rtol": 1e-5, "atol": 1e-4}
ROUTINGS = ["dense", "top2", "block", "prompt-probe", "prompt-base", "running-probe", "sigmoid-top2"]
# One routing by the token and one by the prompt for each further trainer.
STARTS = [("dpo", r) for r in ROUTINGS] + [(k, r) for k in ("kto", "grpo") for r in ("top2", "prompt-probe")]


def log_of(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def first_differences(kind: str, trainer: Any) -> list[float]:
    """What is exactly 0 while the policy is its own reference."""
    if kind == "grpo":
        return [log_of(trainer, "kl")[0]]
    return [log_of(trainer, f"rewards/{which}")[0] for which in ("chosen", "rejected")]


@pytest.mark.parametrize(("kind", "routing"), STARTS)
def test_the_start_is_the_mixture_before_training(zoo: Zoo, tmp_path: Path, kind: str, routing: str) -> None:
    model = zoo.mixture("llama", routing)
    start = copy.deepcopy(model)
    trainer = make_preference_trainer(kind, model, tmp_path, max_steps=3)
    trainer.train()
    assert first_differences(kind, trainer) == pytest.approx([0.0] * len(first_differences(kind, trainer)))
    if kind == "dpo":
        assert log_of(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert list(trainer.model.peft_config) == ["default"]  # no copy of the experts
    batch = batch_of(trainer)
    found, now = reference_logps(trainer, batch), logps(trainer.model.eval(), batch).sum(-1)
    torch.testing.assert_close(found.double(), logps(start.eval(), batch).sum(-1), **CLOSE)
    assert (found - now).abs().max() > 1e-2  # the policy has moved since
    if kind == "grpo":
        given = batch["drawn"]["ref_per_token_logps"] * batch["drawn"]["completion_mask"]
        torch.testing.assert_close(given.sum(-1), found, **CLOSE)


@pytest.mark.parametrize("kind", WITH_REFERENCE)
def test_the_base_is_the_bare_base(zoo: Zoo, tmp_path: Path, kind: str) -> None:
    model, start = zoo.mixture("llama", "prompt-probe"), zoo.mixture("llama", "prompt-probe")
    trainer = make_preference_trainer(kind, model, tmp_path, given={"reference": "base"}, max_steps=3)
    trainer.train()
    batch = batch_of(trainer)
    wanted = logps(zoo.base("llama"), batch).sum(-1)
    torch.testing.assert_close(reference_logps(trainer, batch).double(), wanted, **CLOSE)
    assert all(abs(value) > 1e-3 for value in first_differences(kind, trainer))
    assert (
        logps(start, batch).sum(-1) - wanted
    ).abs().max() > 0.1  # so that start and base can be told apart


def test_dpo_against_the_base_is_its_formula(zoo: Zoo, tmp_path: Path) -> None:
    trainer = make_preference_trainer(
        "dpo", zoo.mixture("llama", "top2"), tmp_path, given={"reference": "base"}, beta=0.3
    )
    batch = batch_of(trainer)
    policy, base = (logps(m, batch).sum(-1) for m in (zoo.mixture("llama", "top2"), zoo.base("llama")))
    chosen, rejected = (policy - base).chunk(2)
    wanted = -torch.nn.functional.logsigmoid(0.3 * (chosen - rejected)).mean()
    found = trainer.compute_loss(trainer.model.train(), batch)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)  # float32 against float64


@pytest.mark.parametrize("kind", WITH_REFERENCE)
def test_the_references_of_plain_trl(zoo: Zoo, tmp_path: Path, kind: str) -> None:
    """A PeftModel gets a copy of its mixture for the reference, a ``peft_config`` the bare base."""
    started = make_preference_trainer(
        kind, zoo.mixture("llama", "top2"), tmp_path, plain=PLAIN[kind], max_steps=2
    )
    started.train()
    assert first_differences(kind, started) == pytest.approx([0.0] * len(first_differences(kind, started)))
    assert list(started.model.peft_config) == ["default", "ref"]
    config = MoLoraConfig(
        experts=zoo.experts("llama"), task_type="CAUSAL_LM", router="linear", router_init_std=0.5
    )
    fresh = make_preference_trainer(
        kind, zoo.base("llama"), tmp_path, plain=PLAIN[kind], given={"peft_config": config}
    )
    fresh.train()
    assert all(abs(value) > 1e-3 for value in first_differences(kind, fresh))
    ours = make_preference_trainer(kind, zoo.base("llama"), tmp_path, given={"peft_config": config})
    ours.train()
    assert first_differences(kind, ours) == pytest.approx([0.0] * len(first_differences(kind, ours)))


def test_a_fitted_router_is_part_of_the_start(zoo: Zoo, tmp_path: Path) -> None:
    """What is set before ``train()`` is part of the start; an evaluation does not store it."""
    model = zoo.mixture("llama", "top2")
    trainer = make_preference_trainer("dpo", model, tmp_path, max_steps=2)
    trainer.evaluate(trainer.train_dataset)
    set_routers(trainer.model, 7)
    trainer.train()
    assert log_of(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    stored = {
        name: value for name, value in trainer.reference.stored.items() if name.endswith("scorer.weight")
    }
    trained = dict(trainer.model.named_parameters())
    assert stored
    assert all(not torch.equal(value, trained[name]) for name, value in stored.items())


def test_balancing_biases_belong_to_the_start(zoo: Zoo, tmp_path: Path) -> None:
    """A bias is a buffer that TRL's copy omits, although it decides which experts are selected."""
    model = zoo.mixture("llama", "dense", top_k=1, norm_topk_prob=False, router_bias_update_rate=0.5)
    with torch.no_grad():
        for index, (_, router) in enumerate(routers(model)):
            router.balance_bias.copy_(torch.eye(3)[index % 3])
    start = copy.deepcopy(model)
    trainer = make_preference_trainer("dpo", model, tmp_path, max_steps=3)
    trainer.train()
    assert log_of(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    batch = batch_of(trainer)
    wanted = logps(start.eval(), batch).sum(-1)
    torch.testing.assert_close(reference_logps(trainer, batch).double(), wanted, **CLOSE)
    moved = [router.balance_bias for _, router in routers(trainer.model)]
    assert any(not torch.equal(bias, torch.eye(3)[i % 3]) for i, bias in enumerate(moved))


def test_a_resumed_run_keeps_the_start_of_the_first(zoo: Zoo, tmp_path: Path) -> None:
    """Four steps are two, a checkpoint, and two more in a mixture that began with another router."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    straight = make_preference_trainer(
        "dpo", zoo.mixture("llama", "top2"), tmp_path / "a", max_steps=4, **saving
    )
    straight.train()
    checkpoint = tmp_path / "a" / "checkpoint-2"
    assert (checkpoint / FILE).is_file()
    assert not (checkpoint / "ref").exists()
    model = zoo.mixture("llama", "top2", seed=9)
    resumed = make_preference_trainer("dpo", model, tmp_path / "b", max_steps=4, **saving)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(router_values(resumed.model), router_values(straight.model))
    assert log_of(resumed, "loss")[-1] == log_of(straight, "loss")[3]


def test_a_checkpoint_without_a_start_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    """A run with reference="base" stores no start: resuming with "start" would take the trained router."""
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    given = {"reference": "base"}
    make_preference_trainer("dpo", zoo.mixture("llama", "top2"), tmp_path, given=given, **saving).train()
    checkpoint = tmp_path / "checkpoint-2"
    assert not (checkpoint / FILE).exists()
    other = make_preference_trainer("dpo", zoo.mixture("llama", "top2"), tmp_path / "c", max_steps=4)
    with pytest.raises(PeftMoeError, match=r"holds no reference\.safetensors"):
        other.train(resume_from_checkpoint=str(checkpoint))
    fine = make_preference_trainer(
        "dpo", zoo.mixture("llama", "top2"), tmp_path / "c", given=given, max_steps=4
    )
    fine.train(resume_from_checkpoint=str(checkpoint))
    assert fine.state.global_step == 4


@pytest.mark.parametrize("kind", WITH_REFERENCE)
def test_a_reference_that_follows(zoo: Zoo, tmp_path: Path, kind: str) -> None:
    follow = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25}
    model = zoo.mixture("llama", "dense")
    start = router_values(model).clone()
    trainer = make_preference_trainer(kind, model, tmp_path, max_steps=3, **follow)
    after_two: list[torch.Tensor] = []

    class Look(type(trainer.callback_handler.callbacks[0])):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                after_two.append(router_values(trainer.model).clone())

    trainer.add_callback(Look())
    trainer.train()
    assert trainer.args.sync_ref_model  # TRL's constructor saw False; the argument is restored
    names = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    start_now = torch.cat([trainer.reference.stored[name].flatten() for name in names])
    torch.testing.assert_close(start_now, 0.75 * start + 0.25 * after_two[0])
    assert not torch.equal(start_now, start)


def test_precomputed_log_probabilities_equal_computed_ones(zoo: Zoo, tmp_path: Path) -> None:
    """The same holds with TRL's cache on disk, which must distinguish references of one dataset."""

    def losses(reference: str, seed: int, precompute: bool) -> list[float]:
        model = zoo.mixture("llama", "top2", seed=seed)
        trainer = make_preference_trainer(
            "dpo",
            model,
            tmp_path,
            given={"reference": reference},
            max_steps=2,
            precompute_ref_log_probs=precompute,
        )
        trainer.train()
        return log_of(trainer, "loss")

    for reference, seed in (("start", 0), ("start", 1), ("base", 1)):
        assert losses(reference, seed, True) == pytest.approx(losses(reference, seed, False), abs=1e-6)


def test_an_evaluation_reports_the_policy_and_not_its_reference(zoo: Zoo, tmp_path: Path) -> None:
    model = zoo.mixture("llama", "dense")
    trainer = make_preference_trainer("dpo", model, tmp_path, max_steps=1)
    trainer.train()
    with torch.no_grad():
        for _, router in routers(trainer.model):
            router.scorer.weight.zero_()
            router.scorer.bias.copy_(torch.tensor([0.0, -50.0, -50.0]))
    found = trainer.evaluate(trainer.train_dataset)
    assert found["eval_load/wide"] == pytest.approx(1.0)
    assert found["eval_rewards/margins"] != 0


def test_refusals(zoo: Zoo, tmp_path: Path) -> None:
    def make(
        kind: str = "dpo", routing: str = "top2", given: dict[str, Any] | None = None, **more: Any
    ) -> Any:
        return make_preference_trainer(kind, zoo.mixture("llama", routing), tmp_path, given=given, **more)

    with pytest.raises(PeftMoeError, match=r"reference='strat' is unknown.*Did you mean 'start'"):
        make(given={"reference": "strat"})
    with pytest.raises(PeftMoeError, match="are two references; give one"):
        make(given={"reference": "base", "ref_model": zoo.base("llama")})
    with pytest.raises(PeftMoeError, match="reference='base' never moves"):
        make(given={"reference": "base"}, sync_ref_model=True)
    with pytest.raises(PeftMoeError, match="set one of the two to False"):
        make(sync_ref_model=True, precompute_ref_log_probs=True)
    with pytest.raises(PeftMoeError, match="has no effect with beta=0"):
        make("grpo", given={"reference": "base"}, beta=0.0)
    with pytest.raises(PeftMoeError, match="sync_ref_model=True has no effect with beta=0"):
        make("grpo", beta=0.0, sync_ref_model=True)
    with pytest.raises(PeftMoeError, match="train with DDP"):
        make(fsdp=True)
    taught = zoo.mixture("llama", "top2", distillation_coef=1.0)
    learning = make_preference_trainer("dpo", taught, tmp_path, given={"teacher": zoo.base("llama")})
    with pytest.raises(PeftMoeError, match="distil with MoLoraSFTTrainer first"):
        learning.train()
    precomputed = make(precompute_ref_log_probs=True)
    set_routers(precomputed.model, 5)
    with pytest.raises(PeftMoeError, match="changed since"):
        precomputed.train()


def test_a_reference_model_of_the_user(zoo: Zoo, tmp_path: Path) -> None:
    other = zoo.base("llama")
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    original = copy.deepcopy(other)
    trainer = make_preference_trainer(
        "dpo", zoo.mixture("llama", "top2"), tmp_path, given={"ref_model": other}, rows=rows_for("dpo", 8)
    )
    trainer.train()
    batch = batch_of(trainer)
    torch.testing.assert_close(
        reference_logps(trainer, batch).double(), logps(original.eval(), batch).sum(-1), **CLOSE
    )


@pytest.mark.parametrize("reference", ["start", "base"])
def test_on_a_four_bit_base(
    zoo: Zoo, tmp_path: Path, four_bit: Callable[[], nn.Module], reference: str
) -> None:
    """TRL casts trained parameters to bfloat16 there; the start is that of the float32 router."""
    model = zoo.mixture("llama", "top2", base=four_bit())
    trainer = make_preference_trainer(
        "dpo", model, tmp_path, given={"reference": reference}, max_steps=2, learning_rate=1e-3
    )
    before = router_values(trainer.model).clone()
    trainer.train()
    assert all(p.dtype == torch.float32 for _, r in routers(trainer.model) for p in r.parameters())
    assert not torch.equal(before, router_values(trainer.model))
    if reference == "start":
        assert log_of(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    batch = batch_of(trainer)
    other = four_bit() if reference == "base" else zoo.mixture("llama", "top2", base=four_bit())
    torch.testing.assert_close(
        reference_logps(trainer, batch).double(), logps(other.eval(), batch).sum(-1), **CLOSE
    )
