"""A loss that a user registers: one function, one coefficient, and the real trainer adds and logs it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import make_trainer, router_values, samples, tokenised
from support.zoo import Zoo
from torch import Tensor

from peft_moe import MoLoraConfig, PeftMoeError, register_loss
from peft_moe.routers.losses import LOSSES
from peft_moe.training.trainers.auxiliary_losses import AuxiliaryTerms

NAME = "test_peak"


def peak_loss(routing: Any, weights_BT: Tensor, context: Any) -> Tensor:
    """Mean of the largest probability, which flattens the router where it is reduced."""
    probabilities_BTX = routing.logits.softmax(-1)
    return (probabilities_BTX.amax(-1) * weights_BT).sum() / weights_BT.sum()


@pytest.fixture
def registered() -> Iterator[None]:
    register_loss(NAME)(peak_loss)
    yield
    LOSSES.pop(NAME, None)


def run(zoo: Zoo, folder: Path, **fields: Any) -> tuple[Tensor, dict[str, Any]]:
    """Routers after two steps, and the last logged figures."""
    trainer = make_trainer(
        "sft",
        zoo.mixture("llama", "top2", **fields),
        tokenised(samples(8)),
        folder,
        max_steps=2,
        logging_steps=1,
    )
    trainer.train()
    logged: dict[str, Any] = {}
    for entry in trainer.state.log_history:
        logged |= entry
    return router_values(trainer.model), logged


@pytest.mark.usefixtures("registered")
def test_the_trainer_adds_and_logs_it(zoo: Zoo, tmp_path: Path) -> None:
    plain, plain_log = run(zoo, tmp_path / "plain")
    pulled, pulled_log = run(zoo, tmp_path / "pulled", loss_coefs={NAME: 5.0})
    assert 0 < pulled_log[f"{NAME}_loss"] <= 1
    assert f"{NAME}_loss" not in plain_log
    assert not torch.equal(plain, pulled)


@pytest.mark.usefixtures("registered")
def test_a_coefficient_of_zero_switches_it_off(zoo: Zoo, tmp_path: Path) -> None:
    plain, _ = run(zoo, tmp_path / "plain")
    idle, log = run(zoo, tmp_path / "idle", loss_coefs={NAME: 0.0})
    assert f"{NAME}_loss" not in log
    assert torch.equal(plain, idle)


@pytest.mark.usefixtures("registered")
def test_the_coefficient_is_saved_and_a_mixture_without_one_has_no_entry(zoo: Zoo, tmp_path: Path) -> None:
    zoo.mixture("llama", "top2", loss_coefs={NAME: 0.5}).save_pretrained(tmp_path / "with")
    zoo.mixture("llama", "top2").save_pretrained(tmp_path / "without")
    assert json.loads((tmp_path / "with" / "adapter_config.json").read_text())["loss_coefs"] == {NAME: 0.5}
    assert "loss_coefs" not in json.loads((tmp_path / "without" / "adapter_config.json").read_text())


def test_a_saved_mixture_loads_without_the_loss_and_its_training_is_refused(
    zoo: Zoo, tmp_path: Path, registered: None
) -> None:
    zoo.mixture("llama", "top2", loss_coefs={NAME: 0.5}).save_pretrained(tmp_path)
    LOSSES.pop(NAME)
    config = MoLoraConfig.from_pretrained(str(tmp_path))
    assert config.loss_coefs == {NAME: 0.5}
    with pytest.raises(PeftMoeError, match=f"'{NAME}' is not a registered loss"):
        AuxiliaryTerms(config, "default", {})


def test_an_unknown_name_is_refused_with_near_matches(registered: None) -> None:
    with pytest.raises(PeftMoeError, match=f"'test_paek' is not a registered loss.*Did you mean '{NAME}'"):
        MoLoraConfig(experts=3, router="linear", top_k=2, loss_coefs={"test_paek": 0.1})


def test_a_field_does_not_go_into_the_mapping() -> None:
    with pytest.raises(PeftMoeError, match=r"'router_z_loss_coef' is a field of MoLoraConfig"):
        MoLoraConfig(experts=3, router="linear", top_k=2, loss_coefs={"router_z_loss_coef": 0.1})


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": NAME}, f"loss name '{NAME}' is taken by"),
        ({"name": ""}, "must be non-empty text"),
        ({}, "give either a name or a field"),
        ({"name": "other", "field": "other_coef"}, "give either a name or a field"),
        ({"name": "other", "log": "loss"}, "the log name 'loss' is taken"),
        ({"name": "other", "log": f"{NAME}_loss"}, f"the log name '{NAME}_loss' is taken"),
    ],
)
def test_refused_registrations(arguments: dict[str, Any], message: str) -> None:
    def another_loss(routing: Any, weights_BT: Tensor, context: Any) -> Tensor:
        return weights_BT.sum()

    before = dict(LOSSES)
    with pytest.raises(PeftMoeError, match=message):
        register_loss(**arguments)(another_loss)
    assert before == LOSSES
