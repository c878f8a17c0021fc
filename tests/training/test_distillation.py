"""Distillation through the real trainers: the teacher, the numbers, accumulation, what it leaves alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from support.batches import IGNORE
from support.routing import choose
from support.training import (
    batches_of,
    collate,
    gradients,
    joined,
    make_trainer,
    router_values,
    samples,
    tokenised,
    trained_gradients,
)
from support.zoo import Zoo
from transformers import LlamaConfig, LlamaForCausalLM

from peft_moe import PeftMoeError, routing_inputs
from peft_moe.training.trainers.adaptive_weights import AdaptiveWeights
from peft_moe.training.trainers.distillation import own_expert_gates
from peft_moe.tuner.config.domains import domain_columns

T = 2.0
DISTIL = {"distillation_coef": 0.7, "distillation_temperature": T}
CLOSE = 1e-4  # as in test_router_gradients


def log_of(trainer: Any) -> dict[str, float]:
    return next(e for e in trainer.state.log_history if "loss" in e)


def own_logits(zoo: Zoo, row: dict[str, Any]) -> torch.Tensor:
    """What the sample's own expert says, by PEFT alone; the base where there is none."""
    base = zoo.base("llama")
    expert = row["domain"] in ("wide", "narrow", "upper")
    model: Any = PeftModel.from_pretrained(base, zoo.experts("llama")[row["domain"]]) if expert else base
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0]


def kl_by_hand(zoo: Zoo, model: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    """T²·KL(own expert ‖ mixture), sample by sample without padding, over all completion tokens' mean."""
    total, count = torch.zeros(()), 0
    for row in rows:
        teacher = torch.log_softmax(own_logits(zoo, row) / T, -1)
        labels = torch.tensor([row["labels"]])
        with routing_inputs(prompt_mask=labels == IGNORE):
            student = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        student = torch.log_softmax(student / T, -1)
        for position, label in enumerate(row["labels"][1:]):
            if label != IGNORE:
                p = teacher[position].exp()
                total = total + T**2 * (p * (teacher[position] - student[position])).sum()
                count += 1
    return total / count


@pytest.mark.parametrize("kind", ["sft", "plain"])
@pytest.mark.parametrize("routing", ["top2", "prompt-probe"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_gradient_and_log_are_those_of_the_formula(
    zoo: Zoo, tmp_path: Path, kind: str, routing: str, accumulation: int
) -> None:
    """Samples of unequal length: every token weighs the same, however the batch is cut."""
    data = tokenised(samples(4))
    sizes = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    without = trained_gradients(kind, zoo.mixture("llama", routing), data, tmp_path, **sizes)
    found = trained_gradients(kind, zoo.mixture("llama", routing, **DISTIL), data, tmp_path, **sizes)
    model = zoo.mixture("llama", routing)
    loss = kl_by_hand(zoo, model, list(data))
    (DISTIL["distillation_coef"] * loss).backward()
    expected = joined(gradients(model))
    difference = joined(found) - joined(without)
    assert expected.norm() > 1e-3
    assert (difference - expected).norm() < CLOSE * max(expected.norm(), joined(without).norm())

    logs = []
    for fields in ({}, DISTIL):
        trainer = make_trainer(kind, zoo.mixture("llama", routing, **fields), data, tmp_path, **sizes)
        trainer.train()
        logs.append(log_of(trainer))
    assert logs[1]["distillation_loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert logs[1]["loss"] - logs[0]["loss"] == pytest.approx(0.7 * loss.item(), abs=1e-4)
    assert "distillation_loss" not in logs[0]


def test_batch_times_accumulation_is_all_that_counts(zoo: Zoo, tmp_path: Path) -> None:
    data = tokenised(samples(8))

    def after(batch: int, accumulation: int, **more: Any) -> torch.Tensor:
        model = zoo.mixture("llama", "top2", **DISTIL, distillation_adaptive=True)
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, **more}
        sgd = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1}
        make_trainer("sft", model, data, tmp_path, **sgd, **sizes).train()
        return router_values(model)

    whole = after(4, 1)
    checkpointing = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    torch.testing.assert_close(after(2, 2, **checkpointing), whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(after(1, 4), whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3", "qwen3"])
def test_logits_of_other_heads(zoo: Zoo, tmp_path: Path, architecture: str) -> None:
    """A student that is its own teacher has nothing to learn, unless its logits were made wrongly."""
    base = zoo.base(architecture)
    if architecture == "gemma3":
        base.config.final_logit_softcapping = 2.0  # of logits of about 3
    model = zoo.mixture(architecture, "top2", base=base, distillation_coef=1.0)
    choose(model, 0)
    data = Dataset.from_list([row for row in tokenised(samples(16)) if row["domain"] == "wide"])
    trainer = make_trainer("sft", model, data, tmp_path)
    trainer.train()
    assert log_of(trainer)["distillation_loss"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["sft", "plain"])
def test_under_autocast(zoo: Zoo, tmp_path: Path, kind: str) -> None:
    found = []
    for bf16 in (False, True):
        model = zoo.mixture("llama", "top2", **DISTIL)
        trainer = make_trainer(kind, model, tokenised(samples(4)), tmp_path, bf16=bf16)
        trainer.train()
        found.append(log_of(trainer)["distillation_loss"])
    assert found[1] == pytest.approx(found[0], rel=0.05)  # bf16 keeps 8 bits of every activation
    assert found[1] != found[0]


def test_an_unknown_transformation_of_logits_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    model = zoo.mixture("llama", "top2", distillation_coef=1.0)
    trainer = make_trainer("plain", model, tokenised(samples(4)), tmp_path)

    def double(module: Any, args: Any, output: Any) -> Any:
        output.logits = 2 * output.logits
        return output

    model.get_base_model().register_forward_hook(double)
    with pytest.raises(PeftMoeError, match="LlamaForCausalLM changes its logits by more"):
        trainer.train()


def test_dropout_is_for_the_student(zoo: Zoo, tmp_path: Path) -> None:
    base = zoo.base("gpt2")
    model = zoo.mixture("gpt2", "top2", base=base, **DISTIL).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    data = tokenised(samples(4))
    trainer = make_trainer("sft", model, data, tmp_path)
    batch = batches_of(data, 4)[0]
    column = domain_columns(model.peft_config["default"])
    known = {"prompt_mask": None, "domains": torch.tensor([column(d) for d in batch.pop("domain")])}
    state = torch.get_rng_state()
    one, two = (trainer._distiller.teach(model, batch, known) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), state)  # the student's own draws stay as they were
    assert all(module.training for module in model.modules())
    assert batch.keys() == collate([{"input_ids": [3], "labels": [3]}]).keys()


def test_own_experts() -> None:
    class Config:
        expert_names, routed_names, num_experts = ["math", "all", "code"], ["math", "code"], 3

    gates = own_expert_gates(torch.tensor([1, 0, 2, -1]), Config())  # type: ignore[arg-type]
    assert gates.tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0]]
    per_token = own_expert_gates(torch.tensor([[0, 1], [-1, 2]]), Config())  # type: ignore[arg-type]
    assert per_token.tolist() == [[[1, 0, 0], [0, 0, 1]], [[0, 0, 0], [0, 0, 0]]]


# -- a given teacher ---------------------------------------------------------------------------------


def test_a_given_teacher_is_followed(zoo: Zoo, tmp_path: Path) -> None:
    data = tokenised(samples(8)).remove_columns("domain")
    teacher = PeftModel.from_pretrained(zoo.base("llama"), zoo.experts("llama")["upper"])
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    model = zoo.mixture("llama", "prompt-soft", distillation_coef=5.0)
    trainer = make_trainer("sft", model, data, tmp_path, max_steps=25, given={"teacher": teacher})
    trainer.train()
    logs = [e for e in trainer.state.log_history if "loss" in e]
    assert logs[-1]["distillation_loss"] < 0.3 * logs[0]["distillation_loss"]
    assert logs[-1]["load/upper"] > 0.8  # the teacher is that expert
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any("teacher" in name for name, _ in model.named_modules())


def test_teachers_that_cannot_teach(zoo: Zoo, tmp_path: Path) -> None:
    data = tokenised(samples(4))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    other = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
    model = zoo.mixture("llama", "top2", distillation_coef=1.0)
    with pytest.raises(PeftMoeError, match="teacher's vocabulary has 50 tokens, the base's 48"):
        make_trainer("sft", model, data, tmp_path, given={"teacher": other})
    with pytest.raises(PeftMoeError, match="teacher=LlamaForCausalLM has no effect with distillation_coef=0"):
        make_trainer("sft", zoo.mixture("llama", "top2"), data, tmp_path, given={"teacher": other})
    with pytest.raises(PeftMoeError, match="needs a causal language model, not a T5"):
        make_trainer("plain", zoo.mixture("t5", "top2", distillation_coef=1.0), data, tmp_path)
    with pytest.raises(PeftMoeError, match="domains of packed samples"):
        make_trainer("sft", model, Dataset.from_list(samples(4)), tmp_path, packing=True, max_length=32)


# -- what it leaves alone ----------------------------------------------------------------------------


def test_recorded_decisions_are_the_students(zoo: Zoo, tmp_path: Path) -> None:
    """Loads, entropies and label losses are the same with a teacher as without."""
    seen = []
    for fields in ({}, DISTIL):
        model = zoo.mixture("llama", "prompt-probe", router_label_loss_coef=1.0, **fields)
        held_out = {"eval_dataset": tokenised(samples(4, seed=1))}
        trainer = make_trainer("sft", model, tokenised(samples(4)), tmp_path, given=held_out)
        metrics = trainer.evaluate()
        trainer.train()
        seen.append((metrics, log_of(trainer)))
    keys = [
        "router_entropy",
        "router_label_loss",
        *(f"load/{n}" for n in ("wide", "narrow", "upper", "null")),
    ]
    for key in keys:
        assert seen[0][1][key] == pytest.approx(seen[1][1][key], abs=1e-6), key
        assert seen[0][0][f"eval_{key}"] == pytest.approx(seen[1][0][f"eval_{key}"], abs=1e-6), key
    assert seen[1][0]["eval_distillation_loss"] > 0
    difference = seen[1][0]["eval_loss"] - seen[0][0]["eval_loss"]
    assert difference == pytest.approx(0.7 * seen[1][0]["eval_distillation_loss"], abs=1e-4)


def test_held_out_data_may_lack_labels(zoo: Zoo, tmp_path: Path) -> None:
    held_out = {"eval_dataset": tokenised(samples(4)).remove_columns("domain")}
    model = zoo.mixture("llama", "top2", **DISTIL)
    metrics = make_trainer("sft", model, tokenised(samples(4)), tmp_path, given=held_out).evaluate()
    assert "eval_loss" in metrics
    assert "eval_distillation_loss" not in metrics


def test_the_mixture_comes_closer_to_the_experts(zoo: Zoo, tmp_path: Path) -> None:
    model = zoo.mixture("llama", "prompt-soft", distillation_coef=5.0)
    trainer = make_trainer("sft", model, tokenised(samples(12)), tmp_path, max_steps=40, learning_rate=3e-2)
    trainer.train()
    logged = [e["distillation_loss"] for e in trainer.state.log_history if "loss" in e]
    assert sum(logged[-5:]) < 0.6 * sum(logged[:5])


# -- adaptive weights --------------------------------------------------------------------------------


def test_adaptive_factors_by_hand() -> None:
    values: dict[str, float] = {}
    adaptive = AdaptiveWeights(values)
    assert adaptive.factors == (1.0, 1.0)
    for language, distillation in ((4.0, 2.0), (3.0, 1.0)):
        for _ in range(2):  # two micro-batches, whose parts add up to the step's loss
            adaptive.count(torch.tensor(language / 2), torch.tensor(distillation / 2))
        adaptive.step()
    left = (0.9 * 4 + 0.1 * 3) / 4, (0.9 * 2 + 0.1 * 1) / 2
    wanted = 2 * left[0] / sum(left), 2 * left[1] / sum(left)
    assert adaptive.factors == pytest.approx(wanted)
    assert adaptive.factors[0] > 1 > adaptive.factors[1]  # the distillation has fallen by more
    adaptive.step()  # a step without a count changes nothing
    assert adaptive.factors == pytest.approx(wanted)


def test_a_loss_that_begins_at_zero_is_no_division_by_zero() -> None:
    adaptive = AdaptiveWeights({})
    adaptive.count(torch.tensor(1.0), torch.tensor(0.0))
    adaptive.step()
    assert adaptive.factors == (1.0, 1.0)


def adaptive_run(zoo: Zoo, folder: Path, seed: int = 0, **settings: Any) -> Any:
    model = zoo.mixture("llama", "prompt-soft", seed=seed, **DISTIL, distillation_adaptive=True)
    return make_trainer("sft", model, tokenised(samples(8)), folder, **settings)


def test_the_weights_adapt_and_resume_to_the_bit(zoo: Zoo, tmp_path: Path) -> None:
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 3e-2}
    straight = adaptive_run(zoo, tmp_path, **settings)
    straight.train()
    logs = [e for e in straight.state.log_history if "loss" in e]
    factors = [(e["language_factor"], e["distillation_factor"]) for e in logs]
    assert factors[0] == (1.0, 1.0)
    assert abs(factors[-1][0] - 1) > 1e-2
    assert all(sum(pair) == pytest.approx(2) for pair in factors)
    stored = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    # The key by which checkpoints of earlier runs are found.
    assert "first_language_loss" in stored["stateful_callbacks"]["RouterState"]["attributes"]["values"]
    resumed = adaptive_run(zoo, tmp_path / "again", seed=5, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    found = [e for e in resumed.state.log_history if "loss" in e]
    assert [(e["language_factor"], e["distillation_factor"]) for e in found] == factors
    assert torch.equal(router_values(resumed.model), router_values(straight.model))
    fixed = make_trainer(
        "sft",
        zoo.mixture("llama", "prompt-soft", **DISTIL),
        tokenised(samples(8)),
        tmp_path / "x",
        **settings,
    )
    fixed.train()
    assert not torch.equal(router_values(fixed.model), router_values(straight.model))
