"""Editing a mixture that trains: optimizer, later checkpoints, rows from texts, experts that stay still."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.adapters import Recipe
from support.batches import batch_for, logits_of, texts
from support.routing import routers, set_routers
from support.training import make_trainer, samples, tokenised, tokenizer
from support.zoo import Zoo
from torch import Tensor

from peft_moe import MoLoraConfig, PeftMoeError, editing, record_routing
from peft_moe.tuner.layers.linear import MoLoraLayer

BATCH = batch_for("llama", texts())
LETTERS = {"wide": "abcde", "narrow": "klmno", "upper": "uvwxy", "extra": "01234"}


@pytest.fixture
def extra(zoo: Zoo) -> str:
    """A fourth adapter, for the same modules."""
    return zoo.adapter("llama", "extra", Recipe("all", 9, {"r": 5, "lora_alpha": 10}))


def mixture(zoo: Zoo, **fields: Any) -> PeftModel:
    config = MoLoraConfig(
        **{"experts": zoo.experts("llama"), "router": "linear", "task_type": "CAUSAL_LM", **fields}
    )
    model = get_peft_model(zoo.base("llama"), config)
    set_routers(model)
    return model


def step(model: PeftModel, optimizer: Any) -> None:
    labels = BATCH["input_ids"]
    optimizer.zero_grad()
    model(**BATCH, labels=labels).loss.backward()
    optimizer.step()


def adam(model: PeftModel, **settings: Any) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, **{"lr": 1e-2, "weight_decay": 0.1, **settings})


def factors(model: PeftModel) -> dict[tuple[str, str, str], Tensor]:
    names = model.peft_config["default"].expert_names
    return {
        (layer.name, name, side): tensor.detach().clone()
        for layer in model.modules()
        if isinstance(layer, MoLoraLayer)
        for place, name in enumerate(names)
        if (pair := layer.expert_factors("default", place)) is not None
        for side, tensor in zip("AB", pair, strict=True)
    }


# -- the optimizer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("trains", [False, True], ids=["router", "router and experts"])
def test_the_optimizer_follows_what_comes_and_goes(zoo: Zoo, extra: str, trains: bool) -> None:
    """Moments move with their rows: there and back, a run goes on as one that was never edited."""
    edited, other = (mixture(zoo, train_experts=trains) for _ in range(2))
    optimizers = adam(edited), adam(other)
    for _ in range(2):
        step(edited, optimizers[0])
        step(other, optimizers[1])
    editing.add_expert(edited, "extra", extra, init="zero", optimizer=optimizers[0])
    trained = [p for p in edited.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for g in optimizers[0].param_groups for p in g["params"]}
    assert [id(p) for p in trained] == [id(p) for p in optimizers[0].param_groups[0]["params"]]
    for parameter in trained:
        moments = optimizers[0].state[parameter]
        assert moments["exp_avg"].shape == parameter.shape
        assert moments["step"] == 2
    for _, router in routers(edited):
        assert optimizers[0].state[router.scorer.weight]["exp_avg"][3].abs().max() == 0
        assert optimizers[0].state[router.scorer.weight]["exp_avg"][:3].abs().max() > 0
    editing.reorder_experts(edited, ["extra", "upper", "wide", "narrow"], optimizer=optimizers[0])
    editing.remove_expert(edited, "extra", optimizer=optimizers[0])
    editing.reorder_experts(edited, ["wide", "narrow", "upper"], optimizer=optimizers[0])
    for _ in range(2):
        step(edited, optimizers[0])
        step(other, optimizers[1])
    mine, theirs = edited.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_without_its_optimizer_an_edit_would_leave_the_new_weights_alone(zoo: Zoo, extra: str) -> None:
    """The control of the test above: what ``optimizer`` is for."""
    model = mixture(zoo)
    optimizer = adam(model)
    step(model, optimizer)
    editing.add_expert(model, "extra", extra)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not any(id(p) in held for p in model.parameters() if p.requires_grad)


def test_new_layers_join_the_group_of_their_kind(zoo: Zoo, extra: str) -> None:
    folder = zoo.experts("llama")["narrow"]  # attention only
    model = mixture(zoo, experts={"narrow": folder, "second": folder + "/."}, null_expert=True)
    weights = [p for n, p in model.named_parameters() if p.requires_grad and n.endswith("weight")]
    biases = [p for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")]
    optimizer = torch.optim.SGD([{"params": weights, "lr": 0.1}, {"params": biases, "lr": 0.2}], momentum=0.9)
    step(model, optimizer)
    done = editing.add_expert(model, "extra", extra, optimizer=optimizer)
    assert done.injected
    names = {p: n for n, p in model.named_parameters()}
    for group, end in zip(optimizer.param_groups, ("weight", "bias"), strict=True):
        assert all(names[p].endswith(end) for p in group["params"])
        assert any("mlp" in names[p] for p in group["params"])
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    step(model, optimizer)
    moved = [n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])]
    assert any("mlp" in name for name in moved)


def test_a_later_checkpoint_resumes_to_the_bit(zoo: Zoo, extra: str, tmp_path: Path) -> None:
    """The real trainer, on an edited and saved mixture: stopped and resumed, as one that never stopped."""
    model = mixture(zoo)
    editing.add_expert(model, "extra", extra)
    editing.remove_expert(model, "narrow")
    model.save_pretrained(str(tmp_path / "edited"))
    data = tokenised([r for r in samples(16) if r["domain"] != "narrow"])

    def trainer(folder: str) -> Any:
        loaded = PeftModel.from_pretrained(zoo.base("llama"), str(tmp_path / "edited"), is_trainable=True)
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "seed": 1}
        return make_trainer("plain", loaded, data, tmp_path / folder, **settings)

    whole = trainer("whole")
    whole.train()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    mine, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_a_trainer_goes_on_and_its_checkpoint_is_valid(zoo: Zoo, extra: str, tmp_path: Path) -> None:
    """An expert comes in the middle of a run; the checkpoint after it resumes, optimizer and all."""
    from transformers import TrainerCallback

    class Add(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                editing.add_expert(kwargs["model"], "extra", extra, optimizer=kwargs["optimizer"])

    data = tokenised(samples(16))
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "seed": 1}
    losses = {"router_label_loss_coef": 1.0, "router_aux_loss_coef": 0.1}
    model, given = mixture(zoo, **losses, top_k=2), {"callbacks": [Add()]}
    whole = make_trainer("plain", model, data, tmp_path / "whole", given=given, **settings)
    whole.train()
    assert whole.model.peft_config["default"].expert_names[-1] == "extra"
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    loaded = PeftModel.from_pretrained(zoo.base("llama"), str(checkpoint), is_trainable=True)
    resumed = make_trainer("plain", loaded, data, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    mine, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


# -- rows from texts ---------------------------------------------------------------------------------


def planted(each: int = 12) -> list[dict[str, str]]:
    """Every domain has letters of its own."""
    rng = random.Random(0)
    return [
        {"prompt": "".join(rng.choices(letters, k=rng.randint(4, 12))) + "=", "domain": name}
        for _ in range(each)
        for name, letters in LETTERS.items()
    ]


@pytest.mark.parametrize("init", ["centroid", "fit", "refit"])
@pytest.mark.parametrize("router", ["context", "linear"])
def test_rows_from_texts(zoo: Zoo, extra: str, router: str, init: str) -> None:
    from peft_moe.fitting import fit_router

    model = mixture(zoo, router=router, null_expert=False).eval()
    fit_router(model, [r for r in planted() if r["domain"] != "extra"], tokenizer(), progress=False)
    before = {name: router.scorer.weight.detach().clone() for name, router in routers(model)}
    editing.add_expert(
        model, "extra", extra, init=init, data=planted(), tokenizer=tokenizer(), progress=False
    )
    for name, one in routers(model):
        kept = torch.equal(one.scorer.weight[:3], before[name])
        assert kept == (init != "refit")
    if router == "context":
        right = [_chosen(model, row["prompt"]) == list(LETTERS).index(row["domain"]) for row in planted()]
        # Letters that no two domains share; a centroid's border need not separate them all.
        assert sum(right) / len(right) >= (0.9 if init == "centroid" else 0.95)


def _chosen(model: PeftModel, prompt: str) -> int:
    with torch.no_grad(), record_routing() as record:
        model(torch.tensor([tokenizer()(prompt)["input_ids"]]))
    return int(next(iter(record.decisions.values())).logits[0, -1].argmax())


def test_a_failed_fit_leaves_the_model_as_it_was(zoo: Zoo, extra: str) -> None:
    model = mixture(zoo).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = logits_of(model, BATCH)
    rows = [r for r in planted() if r["domain"] != "extra"]
    with pytest.raises(PeftMoeError, match="no sample of 'extra'"):
        editing.add_expert(
            model, "extra", extra, init="fit", data=rows, tokenizer=tokenizer(), progress=False
        )
    assert model.peft_config["default"].expert_names == ["wide", "narrow", "upper"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits_of(model, BATCH), logits)


# -- experts that stay still -------------------------------------------------------------------------


def test_a_frozen_expert_does_not_move_by_a_bit(zoo: Zoo, tmp_path: Path) -> None:
    model = mixture(zoo, train_experts=True)
    optimizer = adam(model)
    step(model, optimizer)  # momentum of earlier steps must not move it either
    editing.freeze_expert(model, "narrow", optimizer=optimizer)
    before = factors(model)
    for _ in range(3):
        step(model, optimizer)
    now = factors(model)
    assert all(torch.equal(now[key], before[key]) for key in before if key[1] == "narrow")
    assert not any(torch.equal(now[key], before[key]) for key in before if key[1] != "narrow")
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(zoo.base("llama"), str(tmp_path), is_trainable=True)
    assert loaded.peft_config["default"].trains == [True, False, True]
    before = factors(loaded)
    optimizer = adam(loaded)
    step(loaded, optimizer)
    now = factors(loaded)
    assert all(torch.equal(now[key], before[key]) for key in before if key[1] == "narrow")
    assert not any(torch.equal(now[key], before[key]) for key in before if key[1] != "narrow")
    editing.unfreeze_expert(loaded, "narrow", optimizer=optimizer)
    before = factors(loaded)
    step(loaded, optimizer)
    assert not any(torch.equal(factors(loaded)[key], before[key]) for key in before if key[1] == "narrow")


def test_one_expert_of_a_frozen_mixture_trains(zoo: Zoo) -> None:
    model = mixture(zoo)
    optimizer = adam(model)
    editing.unfreeze_expert(model, "wide", optimizer=optimizer)
    before = factors(model)
    for _ in range(2):
        step(model, optimizer)
    now = factors(model)
    assert not any(torch.equal(now[key], before[key]) for key in before if key[1] == "wide")
    assert all(torch.equal(now[key], before[key]) for key in before if key[1] != "wide")
    editing.reorder_experts(model, ["upper", "wide", "narrow"], optimizer=optimizer)
    before = factors(model)
    step(model, optimizer)
    now = factors(model)
    assert {key[1] for key in before if not torch.equal(now[key], before[key])} == {"wide"}
    editing.freeze_expert(model, "wide", optimizer=optimizer)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "molora_A" in n or "molora_B" in n)
    before = factors(model)
    step(model, optimizer)
    now = factors(model)
    assert all(torch.equal(now[key], before[key]) for key in before)
