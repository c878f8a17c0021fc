"""Each further loss through the real trainer: its gradient, its log, its weight that moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import (
    auxiliary_gradients,
    batches_of,
    joined,
    make_trainer,
    router_values,
    samples,
    tokenised,
    trained_gradients,
)
from support.zoo import Zoo

from peft_moe import PeftMoeError
from peft_moe.routers.losses import orthogonality_loss
from peft_moe.training.trainers.auxiliary_losses import log_name
from peft_moe.training.trainers.load_balancing import SparsityController
from peft_moe.tuner.config.domains import domain_columns
from peft_moe.tuner.layers.linear import MoLoraLayer

RELU = {"scoring_func": "relu", "norm_topk_prob": False}
# Case -> (fields that both runs share, the field under test, its value).
CASES: dict[str, tuple[dict[str, Any], str, float]] = {
    "sharp": ({}, "router_entropy_coef", 0.5),
    "flat": ({}, "router_entropy_coef", -0.5),
    "lbc": ({"router_lbc_delta": 0.1}, "router_lbc_coef", 0.5),
    "l1": (RELU, "router_l1_coef", 0.5),
}
CLOSE = 1e-4  # as in test_router_gradients


def mixture(zoo: Zoo, case: str, value: float | None = None, **more: Any) -> Any:
    shared, field, given = CASES[case]
    fields = {**shared, **more, field: given if value is None else value}
    if value == 0:
        fields.pop("router_lbc_delta", None)  # refused without its loss
    return zoo.mixture("llama", "dense" if case == "l1" else "top2", **fields)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_the_trainer_adds_exactly_its_gradient(
    zoo: Zoo, tmp_path: Path, case: str, accumulation: int
) -> None:
    """Of the mean over micro-batches: the balancing loss is no sum over samples, the others are one."""
    data, (_, field, weight) = tokenised(samples(4)), CASES[case]
    sizes = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    without = trained_gradients("sft", mixture(zoo, case, 0.0), data, tmp_path, **sizes)
    found = trained_gradients("sft", mixture(zoo, case), data, tmp_path, **sizes)
    fresh = mixture(zoo, case).train()
    column = domain_columns(fresh.peft_config["default"])
    batches = batches_of(data, 4 // accumulation)
    expected = joined(auxiliary_gradients(fresh, batches, {field: weight}, column))
    assert expected.norm() > 1e-4
    difference = joined(found) - joined(without)
    assert (difference - expected).norm() < CLOSE * max(expected.norm(), joined(without).norm())


def after_two_steps(model: Any, folder: Path, batch: int, accumulation: int) -> torch.Tensor:
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    sgd = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1}
    make_trainer("sft", model, tokenised(samples(8, equal=True)), folder, **sgd, **sizes).train()
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("case", ["sharp", "l1", "orthogonality"])
def test_batch_times_accumulation_is_all_that_counts(zoo: Zoo, tmp_path: Path, case: str) -> None:
    def make() -> Any:
        if case != "orthogonality":
            return mixture(zoo, case)
        return zoo.mixture("llama", "top2", train_experts=True, expert_orthogonality_coef=0.5)

    whole = after_two_steps(make(), tmp_path, 4, 1)
    for batch, accumulation in ((2, 2), (1, 4)):
        found = after_two_steps(make(), tmp_path, batch, accumulation)
        torch.testing.assert_close(found, whole, atol=1e-6, rtol=1e-5)


def test_orthogonality_of_experts_that_train(zoo: Zoo, tmp_path: Path) -> None:
    def make(coefficient: float) -> Any:
        return zoo.mixture("llama", "top2", train_experts=True, expert_orthogonality_coef=coefficient)

    def layers(model: Any) -> list[MoLoraLayer]:
        found = [m for m in model.modules() if isinstance(m, MoLoraLayer)]
        return [m for m in found if sum(r > 0 for r in m.mixtures["default"].rank_map.ranks) > 1]

    data = tokenised(samples(4))
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    without = trained_gradients("sft", make(0.0), data, tmp_path, **sizes)
    found = trained_gradients("sft", make(0.5), data, tmp_path, **sizes)
    fresh = make(0.5)
    each = [
        orthogonality_loss(layer.molora_A["default"].weight, layer.mixtures["default"].rank_map.ranks)
        for layer in layers(fresh)
    ]
    assert 0 < len(each) < 3 * 7  # some layers have one expert only
    (0.5 * torch.stack(each).mean()).backward()
    for name, parameter in fresh.named_parameters():
        if parameter.requires_grad and "molora_A" in name:
            wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(found[name] - without[name], wanted, atol=1e-6, rtol=1e-3)

    model = make(1.0)
    trainer = make_trainer("sft", model, data, tmp_path, max_steps=20, learning_rate=2e-2)
    trainer.train()
    logged = [e["expert_orthogonality_loss"] for e in trainer.state.log_history if "loss" in e]
    assert logged[0] == pytest.approx(torch.stack(each).mean().item(), rel=1e-4)
    assert logged[-1] < 0.5 * logged[0]


@pytest.mark.parametrize("case", CASES)
def test_the_logged_loss_is_the_sum_of_its_logged_parts(zoo: Zoo, tmp_path: Path, case: str) -> None:
    _, field, weight = CASES[case]
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    logs = []
    for value in (0.0, weight):
        model = mixture(zoo, case, value)
        trainer = make_trainer("sft", model, tokenised(samples(4)), tmp_path, **sizes)
        trainer.train()
        logs.append(next(e for e in trainer.state.log_history if "loss" in e))
    extra = weight * logs[1][log_name(field)]
    assert abs(extra) > 1e-3
    assert logs[1]["loss"] - logs[0]["loss"] == pytest.approx(extra, abs=1e-4)
    assert log_name(field) not in logs[0]


def entropy_after(zoo: Zoo, folder: Path, coefficient: float) -> float:
    model = zoo.mixture("llama", "dense", router_entropy_coef=coefficient)
    trainer = make_trainer("sft", model, tokenised(samples(8)), folder, max_steps=10)
    trainer.train()
    return trainer.state.log_history[-2]["router_entropy"]


def test_the_sign_of_the_entropy_weight_chooses_sharp_or_flat(zoo: Zoo, tmp_path: Path) -> None:
    sharp, without, flat = (entropy_after(zoo, tmp_path, c) for c in (5.0, 0.0, -5.0))
    assert sharp < without - 0.05 < flat - 0.1


def test_balancing_by_domain_raises_each_samples_own_expert(zoo: Zoo, tmp_path: Path) -> None:
    """LoRAMoE's loss alone, at no learning from the text, teaches who belongs to whom."""

    def shares(coefficient: float) -> float:
        fields = {"router_lbc_coef": coefficient, "router_lbc_delta": 0.5} if coefficient else {}
        model = zoo.mixture("llama", "prompt-soft", **fields)
        data = tokenised([row for row in samples(16) if row["domain"] == "narrow"])
        trainer = make_trainer("sft", model, data, tmp_path, max_steps=20)
        trainer.train()
        return [e for e in trainer.state.log_history if "loss" in e][-1]["load/narrow"]

    # At the minimum one column of four weighs (1 + δ)/(1 − δ) = 3 times each other one: a half.
    assert shares(20.0) == pytest.approx(0.5, abs=0.05)
    assert abs(shares(0.0) - 0.5) > 0.1


@pytest.mark.parametrize("field", ["router_lbc_coef", "distillation_coef"])
def test_losses_about_domains_are_never_silently_off(zoo: Zoo, tmp_path: Path, field: str) -> None:
    model = zoo.mixture("llama", "top2", **{field: 0.5})
    data = tokenised(samples(4)).remove_columns("domain")
    hint = ", or a teacher" if field == "distillation_coef" else ""
    with pytest.raises(PeftMoeError, match=f"{field}=0.5 needs a `domain` column.*expert{hint}"):
        make_trainer("sft", model, data, tmp_path)


def l1_run(zoo: Zoo, folder: Path, target: float | None, seed: int = 0, **settings: Any) -> Any:
    fields = {**RELU, "router_l1_coef": 0.01, "router_l1_target": target}
    model = zoo.mixture("llama", "dense", seed=seed, **fields)
    return make_trainer("sft", model, tokenised(samples(8)), folder, **settings)


def l1_weights(trainer: Any) -> list[float]:
    return [e["router_l1_weight"] for e in trainer.state.log_history if "router_l1_weight" in e]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_l1_weight_steers_towards_its_target(zoo: Zoo, tmp_path: Path, accumulation: int) -> None:
    """× or ÷ 1.2 once per optimizer step; random ReLU scores begin with half of their gates at zero."""
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation, "max_steps": 4}
    for target, factor in ((0.95, 1.2), (0.05, 1 / 1.2)):
        trainer = l1_run(zoo, tmp_path, target, **sizes)
        trainer.train()
        wanted = [0.01 * factor**step for step in range(1, 5)]
        assert l1_weights(trainer) == pytest.approx(wanted, rel=1e-12)
    fixed = l1_run(zoo, tmp_path, None, **sizes)
    fixed.train()
    assert l1_weights(fixed) == []


def test_the_target_share_of_zero_gates_is_reached(zoo: Zoo, tmp_path: Path) -> None:
    trainer = l1_run(zoo, tmp_path, 0.8, max_steps=60)
    shares: list[float] = []
    step = SparsityController.step

    def spy(self: SparsityController) -> None:
        assert self._counts is not None
        zeros, gates = self._counts.tolist()
        shares.append(zeros / gates)
        step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparsityController, "step", spy)
        trainer.train()
    assert shares[0] < 0.6
    reached = next(index for index, share in enumerate(shares) if share > 0.8)
    weights = l1_weights(trainer)
    assert weights[reached] == pytest.approx(weights[reached - 1] / 1.2)  # and the weight gives way
    assert weights[reached - 1] > weights[0]


@pytest.mark.parametrize("restore", [False, True])
def test_resuming_with_a_moving_l1_weight_is_exact_to_the_bit(
    zoo: Zoo, tmp_path: Path, restore: bool
) -> None:
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1}
    settings["restore_callback_states_from_checkpoint"] = restore
    straight = l1_run(zoo, tmp_path, 0.9, **settings)
    straight.train()
    resumed = l1_run(zoo, tmp_path / "again", 0.9, seed=7, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(set(l1_weights(straight))) == 6
    assert l1_weights(resumed) == l1_weights(straight)
    assert torch.equal(router_values(resumed.model), router_values(straight.model))
