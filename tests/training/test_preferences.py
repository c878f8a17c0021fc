"""TRL's trainers of preferences and rewards on a mixture: what trains, what arrives, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from support.preferences import (
    TRAINERS,
    KeepBatches,
    batch_of,
    logps,
    make_preference_trainer,
    rows_for,
)
from support.routing import set_routers
from support.training import DOMAINS, KeepGradients, joined, router_values, tokenizer
from support.zoo import Zoo
from transformers import AutoModelForSequenceClassification
from trl import GRPOTrainer
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from peft_moe import MoLoraConfig, PeftMoeError, record_routing
from peft_moe.routing.context import current_request
from peft_moe.training import RouterTrainerMixin

KINDS = list(TRAINERS)
LABELS = {"router_label_loss_coef": 1.0}


def mixture(zoo: Zoo, kind: str, routing: str = "dense", **fields: Any) -> Any:
    """Three experts; for rewards on a classifier made of the same base, with a head of its own."""
    if kind != "reward":
        return zoo.mixture("llama", routing, **fields)
    base = AutoModelForSequenceClassification.from_pretrained(zoo.saved_base("llama"), num_labels=1)
    with torch.no_grad():
        base.score.weight.normal_(generator=torch.Generator().manual_seed(0))
    config = MoLoraConfig(
        **{"experts": zoo.experts("llama"), "router": "linear", "task_type": "SEQ_CLS", **fields}
    )
    model = get_peft_model(base, config)
    set_routers(model, 3)
    return model


def numbers(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_routers_alone_change(zoo: Zoo, tmp_path: Path, kind: str, checkpointing: bool) -> None:
    model = mixture(zoo, kind)
    before = numbers(model)
    trainer = make_preference_trainer(
        kind, model, tmp_path, max_steps=2, gradient_checkpointing=checkpointing, weight_decay=0.1
    )
    trainer.train()
    after = numbers(trainer.model)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    heads = {name for name in before if "score.modules_to_save" in name}
    assert heads == changed - {name for name in before if "molora_router" in name}
    assert bool(heads) == (kind == "reward")
    weights = {name for name in before if "molora_router" in name and name.endswith("weight")}
    assert weights <= changed
    assert weights
    last = next(entry for entry in trainer.state.log_history if "load/wide" in entry)
    assert sum(last[f"load/{name}"] for name in ("wide", "narrow", "upper")) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("kind", ["dpo", "kto", "grpo"])
@pytest.mark.parametrize("routing", ["prompt-soft", "block"])
def test_checkpointing_changes_no_gradient(zoo: Zoo, tmp_path: Path, kind: str, routing: str) -> None:
    """The reference's pass lies between the policy's and the backward pass that computes layers again."""
    found = []
    for checkpointing in (False, True):
        keep = KeepGradients()
        make_preference_trainer(
            kind,
            mixture(zoo, kind, routing, router_z_loss_coef=0.1),
            tmp_path,
            given={"callbacks": [keep], "reference": "base"},
            gradient_checkpointing=checkpointing,
        ).train()
        found.append(joined(keep.steps[0]))
    assert found[0].abs().max() > 1e-3
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)  # float32, another order of sums


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_brings_its_domain_to_the_loss(zoo: Zoo, tmp_path: Path, kind: str) -> None:
    """Both answers of a pair, every completion of a prompt, in whatever order they are trained on."""
    model = mixture(zoo, kind, **LABELS)
    rows = rows_for(kind)
    expected = {row["prompt"]: [0, 1, 2, -1][DOMAINS.index(row["domain"])] for row in rows}
    again = {"num_iterations": 2, "steps_per_generation": 2} if kind == "grpo" else {}
    trainer = make_preference_trainer(
        kind, model, tmp_path, rows=rows, max_steps=4, per_device_train_batch_size=4, **again
    )
    seen: dict[str, int] = {}
    passes = 0

    def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal passes
        known = current_request().inputs
        if known is None or known.domains is None or not torch.is_grad_enabled():
            return
        passes += 1
        ids, labels = kwargs["input_ids"], kwargs.get("labels")
        assert len(known.domains) == len(ids)
        for row, domain in enumerate(known.domains.tolist()):
            real = kwargs["attention_mask"][row].bool() & (True if labels is None else labels[row] == -100)
            text = "".join(tokenizer().convert_ids_to_tokens(ids[row][real]))
            seen[text[: text.index("=") + 1]] = domain

    trainer.model.register_forward_hook(look, with_kwargs=True)
    trainer.train()
    assert passes >= 4
    assert seen
    assert seen.items() <= expected.items()
    assert any(domain >= 0 for domain in seen.values())
    assert any("router_label_loss" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("kind", KINDS)
def test_auxiliary_losses_weigh_the_same_under_accumulation(zoo: Zoo, tmp_path: Path, kind: str) -> None:
    """The z-loss alone, of rows of one length: a batch of four, or two of two."""
    found = []
    # With equal rewards completions give no gradient of their own. Answers do, which is taken off again.
    for size, steps, coefficient in ((4, 1, 0.0), (4, 1, 1.0), (2, 2, 0.0), (2, 2, 1.0)):
        keep = KeepGradients()
        given: dict[str, Any] = {"callbacks": [keep]}
        more: dict[str, Any] = {}
        if kind == "grpo":
            given["reward_funcs"] = lambda completions, **columns: [1.0] * len(completions)
            more = {"generation_kwargs": {"min_new_tokens": 6}, "beta": 0.0}
        make_preference_trainer(
            kind,
            mixture(zoo, kind, router_z_loss_coef=coefficient),
            tmp_path,
            rows=rows_for(kind, 8, equal=True),
            given=given,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            **more,
        ).train()
        found.append(joined(keep.steps[0]))
    whole, parts = found[1] - found[0], found[3] - found[2]
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-5)  # differences of float32 gradients


# -- GRPO ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ["top2", "block", "prompt-soft", "prompt-base", "running-probe"])
def test_completions_are_drawn_from_the_policy_that_is_trained(
    zoo: Zoo, tmp_path: Path, routing: str
) -> None:
    """Log-probabilities of the cached generation, of the training pass and of plain logits agree."""
    trainer = make_preference_trainer("grpo", mixture(zoo, "grpo", routing), tmp_path, num_iterations=2)
    drawn: list[torch.Tensor] = []
    generate = trainer.model.generate

    def listen(*args: Any, **kwargs: Any) -> Any:
        out = generate(*args, **kwargs, return_dict_in_generate=True, output_logits=True)
        drawn.append(torch.stack(out.logits, 1).log_softmax(-1))
        return out.sequences

    trainer.model.generate = listen
    batch = batch_of(trainer)
    known = batch["drawn"]
    mask, ids = known["completion_mask"], known["completion_ids"]
    cached = drawn[0].gather(-1, ids[..., None])[..., 0] * mask
    assert (known["prompt_mask"] == 0).any()  # left padding
    torch.testing.assert_close(known["old_per_token_logps"] * mask, cached, rtol=1e-4, atol=1e-4)
    wanted = logps(trainer.model, batch)[:, -ids.shape[1] :]
    torch.testing.assert_close(cached.double(), wanted, rtol=1e-4, atol=1e-4)
    if routing == "prompt-soft":
        # A pass that took the completion for a part of the prompt would be another policy.
        batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
        with torch.no_grad():
            blind = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        blind = blind[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        assert (blind[:, -ids.shape[1] :] * mask - cached).abs().max() > 1e-3


def test_completions_are_trained_on_again_against_the_policy_that_drew_them(zoo: Zoo, tmp_path: Path) -> None:
    trainer = make_preference_trainer(
        "grpo",
        mixture(zoo, "grpo", "prompt-soft"),
        tmp_path,
        num_iterations=2,
        max_steps=4,
        learning_rate=0.05,
    )
    batches = KeepBatches().listen(trainer).batches
    trainer.train()
    olds = [batch["old_per_token_logps"] for batch in batches]
    assert torch.equal(olds[0], olds[1])
    assert not torch.equal(olds[0], olds[2])
    ratios = [entry["clip_ratio/region_mean"] for entry in trainer.state.log_history if "loss" in entry]
    assert ratios[0] == 0  # the first pass is by the policy itself
    first = dict(batches[1])
    now = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([first["prompt_ids"], first["completion_ids"]], 1),
        torch.cat([first["prompt_mask"], first["completion_mask"]], 1),
        first["completion_ids"].shape[1],
    )[0]
    assert ((now - first["old_per_token_logps"]) * first["completion_mask"]).abs().max() > 1e-3


def test_routers_that_need_domains_are_told_while_completions_are_made(zoo: Zoo, tmp_path: Path) -> None:
    """Poly's row is that of the prompt's domain: in generation, in scores in smaller parts, in training."""
    model = mixture(zoo, "grpo", "dense", router="poly")
    trainer = make_preference_trainer(
        "grpo", model, tmp_path, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    before = router_values(trainer.model).clone()
    trainer.train()
    assert not torch.equal(before, router_values(trainer.model))
    rows = [{**row, "domain": ["wide", "upper"]} for row in rows_for("grpo")]
    with pytest.raises(PeftMoeError, match="a prompt has one domain"):
        make_preference_trainer("grpo", mixture(zoo, "grpo"), tmp_path, rows=rows).train()


def test_engines_and_tools_that_sample_from_another_policy_are_refused(zoo: Zoo, tmp_path: Path) -> None:
    def make(routing: str, given: dict[str, Any] | None = None, **settings: Any) -> Any:
        return make_preference_trainer(
            "grpo", mixture(zoo, "grpo", routing), tmp_path, given=given, **settings
        )

    with pytest.raises(PeftMoeError, match=r"use_vllm=True needs the mixture merged.*set use_vllm=False"):
        make("dense", use_vllm=True)
    with pytest.raises(PeftMoeError, match="packs prompts into one row"):
        make("prompt-probe", use_transformers_continuous_batching=True)
    with pytest.raises(PeftMoeError, match=r"tools puts results.*router_granularity='token'"):
        make("prompt-probe", given={"tools": [len]})
    config = MoLoraConfig(experts=zoo.experts("llama"), router="linear")
    with pytest.raises(PeftMoeError, match="use_vllm=True"):  # also before a base is loaded
        make_preference_trainer(
            "grpo", "no/such-model", tmp_path, given={"peft_config": config}, use_vllm=True
        )


def weights_for_vllm(model: PeftModel) -> dict[str, torch.Tensor]:
    """What TRL would send to vLLM, by TRL's own code; the engine itself is not needed for it."""
    engine = object.__new__(VLLMGeneration)
    engine.model, engine._dist = model, DistributedBackend(Accelerator(cpu=True))
    return {name: value.clone() for name, value in engine._iter_named_params()}


def test_merging_for_vllm(zoo: Zoo) -> None:
    """Constant gates arrive merged, under the base's names; others are refused with what to do."""
    with pytest.raises(PeftMoeError, match=r"routes by its input.*serve it with peft_moe imported"):
        weights_for_vllm(zoo.mixture("llama", "dense"))
    model = zoo.mixture("llama", "static")
    sent = weights_for_vllm(model)
    assert sent.keys() == dict(zoo.base("llama").named_parameters()).keys()
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    plain = zoo.base("llama")
    plain.load_state_dict(sent)
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
        # Taken out again afterwards.
        wanted = zoo.mixture("llama", "static")(ids).logits
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_the_same_mixin_on_a_trainer_of_ones_own(zoo: Zoo, tmp_path: Path) -> None:
    """TRL's reference, a copied adapter, with our losses and log."""

    class Mine(RouterTrainerMixin, GRPOTrainer):  # type: ignore[misc]
        def _keep_domains(self) -> None:
            pass

    trainer = make_preference_trainer("grpo", mixture(zoo, "grpo", "top2"), tmp_path, plain=Mine)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "kl" in entry)
    assert logged["kl"] == pytest.approx(0, abs=1e-6)
    assert "router_entropy" in logged


# -- reward models ------------------------------------------------------------------------------------


def test_a_reward_model_is_saved_with_its_head(zoo: Zoo, tmp_path: Path) -> None:
    trainer = make_preference_trainer("reward", mixture(zoo, "reward", **LABELS), tmp_path, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "rm"))
    batch = {k: v for k, v in batch_of(trainer).items() if k in ("input_ids", "attention_mask")}
    base = AutoModelForSequenceClassification.from_pretrained(zoo.saved_base("llama"), num_labels=1)
    base.config.pad_token_id = tokenizer().pad_token_id
    loaded = PeftModel.from_pretrained(base, tmp_path / "rm").eval()
    with torch.no_grad(), record_routing() as record:
        rewards = loaded(**batch).logits
    assert record.decisions
    with torch.no_grad():
        assert torch.equal(trainer.model.eval()(**batch).logits, rewards)
