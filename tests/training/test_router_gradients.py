"""The gradient that reaches a router through real trainers: auxiliary losses, accumulation, checkpointing.

The table of the design's fact 5, cell by cell. A ratio of 1 says that the trainer's gradient holds
exactly the gradient of the auxiliary losses; a loss that the trainer drops would give 0, one that it
forgets to divide by its accumulation steps 4.
"""

from __future__ import annotations

import warnings
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
    tokenizer,
    trained_gradients,
)
from support.zoo import Zoo
from trl import SFTConfig, SFTTrainer

from peft_moe import PeftMoeError
from peft_moe.tuner.config.domains import domain_columns

WEIGHTS = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.2, "router_label_loss_coef": 1.0}
NON_REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
OFF: dict[str, Any] = {}
# float32 sums in another order, and a difference of two gradients: 1e-5 of the gradient's size. A
# forgotten sample, token or factor is off by a tenth and more.
CLOSE = 1e-4


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# The whole table for routers in the layers; for one that all layers share, where it is hardest.
CELLS = [
    ("top2", kind, accumulation, checkpointing)
    for kind in ("plain", "sft")
    for accumulation in (1, 4)
    for checkpointing in (OFF, NON_REENTRANT)
] + [("prompt-probe", kind, 4, NON_REENTRANT) for kind in ("plain", "sft")]


@pytest.mark.parametrize(("routing", "kind", "accumulation", "checkpointing"), CELLS)
def test_the_trainer_adds_exactly_the_auxiliary_gradient(
    zoo: Zoo, tmp_path: Path, routing: str, kind: str, accumulation: int, checkpointing: dict[str, Any]
) -> None:
    data = tokenised(samples(4))  # of unequal length: the mean of means is not the mean
    settings = {
        "per_device_train_batch_size": 4 // accumulation,
        "gradient_accumulation_steps": accumulation,
        **checkpointing,
    }
    without = trained_gradients(kind, zoo.mixture("llama", routing), data, tmp_path, **settings)
    model = zoo.mixture("llama", routing, **WEIGHTS)
    with_losses = trained_gradients(kind, model, data, tmp_path, **settings)
    assert model.get_base_model().is_gradient_checkpointing == bool(checkpointing)

    fresh = zoo.mixture("llama", routing, **WEIGHTS).train()
    batches = batches_of(data, 4 // accumulation)
    column = domain_columns(fresh.peft_config["default"])
    expected = joined(auxiliary_gradients(fresh, batches, WEIGHTS, column))
    found = joined(with_losses) - joined(without)

    ratio = (found @ expected / (expected @ expected)).item()
    assert ratio == pytest.approx(1.0, abs=CLOSE)
    assert relative(found, expected) < CLOSE
    assert joined(without).norm() > 1e-4  # the language model's own gradient is there as well


@pytest.mark.parametrize("kind", ["plain", "sft"])
@pytest.mark.parametrize("routing", ["top2", "block"])
def test_reentrant_checkpointing_trains_routers_inside_the_layers(
    zoo: Zoo, tmp_path: Path, routing: str, kind: str
) -> None:
    """A block's router is as safe as a layer's own: the block is recomputed as a whole."""
    data = tokenised(samples(4))
    plain = joined(trained_gradients(kind, zoo.mixture("llama", routing), data, tmp_path))
    found = joined(trained_gradients(kind, zoo.mixture("llama", routing), data, tmp_path, **REENTRANT))
    assert plain.norm() > 1e-2
    assert relative(found, plain) < CLOSE


@pytest.mark.parametrize("kind", ["plain", "sft"])
@pytest.mark.parametrize(
    ("routing", "fields", "message"),
    [
        ("top2", {"router_z_loss_coef": 0.1}, "router_z_loss_coef would have no effect"),
        ("block", {"router_label_loss_coef": 0.1}, "router_label_loss_coef would have no effect"),
        ("token-base", {}, "a router that several layers share"),
        ("prompt-probe", {}, "a router that several layers share"),
    ],
)
def test_reentrant_checkpointing_is_refused_with_the_fix(
    zoo: Zoo, tmp_path: Path, routing: str, fields: dict[str, Any], message: str, kind: str
) -> None:
    model = zoo.mixture("llama", routing, **fields)
    trainer = make_trainer(kind, model, tokenised(samples(4)), tmp_path, **REENTRANT)
    with pytest.raises(PeftMoeError, match=f"{message}.*use_reentrant=False"):
        trainer.train()


def trained_router(zoo: Zoo, folder: Path, **fields: Any) -> torch.Tensor:
    model = zoo.mixture("llama", "top2", **fields)
    make_trainer("sft", model, tokenised(samples(12)), folder, max_steps=3).train()
    return router_values(model)


@pytest.fixture(scope="module")
def without_losses(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    return trained_router(zoo, tmp_path_factory.mktemp("without"))


@pytest.mark.parametrize("field", WEIGHTS)
def test_the_router_follows_the_coefficient(
    zoo: Zoo, tmp_path: Path, field: str, without_losses: torch.Tensor
) -> None:
    """TRL once dropped such losses: training looked healthy and was the same at 0, 0.01 and 1."""
    a_little = trained_router(zoo, tmp_path, **{field: 0.01})
    much = trained_router(zoo, tmp_path, **{field: 1.0})
    # Runs of one setting are equal to the bit (below); three steps of Adam at 1e-2 go up to 0.03.
    assert (a_little - without_losses).abs().max() > 1e-4
    assert (much - without_losses).abs().max() > 1e-2
    assert (much - a_little).abs().max() > 1e-2


def test_training_is_repeatable(zoo: Zoo, tmp_path: Path, without_losses: torch.Tensor) -> None:
    assert torch.equal(trained_router(zoo, tmp_path), without_losses)


def stock_router(zoo: Zoo, folder: Path, **fields: Any) -> torch.Tensor:
    model = zoo.mixture("llama", "top2", **fields)
    settings = {"bf16": False, "use_cpu": True, "report_to": [], "save_strategy": "no", "max_steps": 2}
    args = SFTConfig(str(folder), learning_rate=1e-2, gradient_checkpointing=False, **settings)
    SFTTrainer(model, args, train_dataset=tokenised(samples(4)), processing_class=tokenizer()).train()
    return router_values(model)


def test_a_stock_trainer_is_not_silent_about_what_it_drops(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="router_z_loss_coef.*MoLoraSFTTrainer") as caught:
        dropped = stock_router(zoo, tmp_path, router_z_loss_coef=1.0)
    assert sum("MoLoraSFTTrainer" in str(w.message) for w in caught) == 1  # once, not once per step
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*MoLoraSFTTrainer")
        plain = stock_router(zoo, tmp_path)  # nothing to drop, nothing to say
        trained_router(zoo, tmp_path, router_z_loss_coef=1.0)  # ours adds the loss
    assert torch.equal(dropped, plain)  # what the warning is about


def test_batch_times_accumulation_is_all_that_counts(zoo: Zoo, tmp_path: Path) -> None:
    """Equal token counts, so that means of means are means; SGD, so that steps are gradients."""
    data = tokenised(samples(8, equal=True))

    def after(batch: int, accumulation: int) -> torch.Tensor:
        model = zoo.mixture("llama", "top2", router_z_loss_coef=0.5)
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        sgd = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1}
        trainer = make_trainer("sft", model, data, tmp_path, **sgd, **sizes)
        trainer.train()
        return router_values(model)

    start = router_values(zoo.mixture("llama", "top2"))
    whole = after(4, 1)
    assert (whole - start).abs().max() > 1e-2
    # float32 sums of another order, on weights of size 1; a missing division would show in the second digit.
    torch.testing.assert_close(after(2, 2), whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(after(1, 4), whole, atol=1e-6, rtol=1e-5)
