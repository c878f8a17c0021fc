"""Tasks whose head PEFT trains beside the mixture: it names the head's modules in the caller's config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.bases import BASES
from support.batches import pad, texts
from support.zoo import Zoo
from torch import Tensor, nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from peft_moe import MoLoraConfig, PeftMoeError

ROWS, WIDTH = 2, 7
# The model of each task, its head, and labels for it.
TASKS: dict[str, tuple[Any, str, Callable[[], dict[str, Tensor]]]] = {
    "TOKEN_CLS": (
        AutoModelForTokenClassification,
        "classifier",
        lambda: {"labels": torch.ones(ROWS, WIDTH, dtype=torch.long)},
    ),
    "QUESTION_ANS": (
        AutoModelForQuestionAnswering,
        "qa_outputs",
        lambda: {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 3])},
    ),
    "SEQ_CLS": (
        AutoModelForSequenceClassification,
        "classifier",
        lambda: {"labels": torch.tensor([0, 1])},
    ),
}
EXPERTS = ("given", "fresh")


def base_of(task: str) -> nn.Module:
    torch.manual_seed(0)
    config = BASES["bert"].config()
    config.num_labels = 2  # begin and end of an answer
    model: nn.Module = TASKS[task][0].from_config(config).eval()
    return model


def config_of(zoo: Zoo, task: str, experts: str, **fields: Any) -> MoLoraConfig:
    if experts == "fresh":
        fields |= {"experts": 2, "r": 4, "target_modules": ["query", "value"], "init_weights": False}
    else:
        fields |= {"experts": zoo.experts("bert")}
    return MoLoraConfig(task_type=task, router="linear", **fields)


def answers(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = model(**batch)
    return output.start_logits if "start_logits" in output else output.logits


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("task", TASKS)
def test_a_head_trains_is_saved_and_loaded(zoo: Zoo, task: str, experts: str, tmp_path: Path) -> None:
    batch = pad(texts(lengths=(WIDTH, WIDTH)))
    model = get_peft_model(base_of(task), config_of(zoo, task, experts))
    head = model.base_model.model.get_submodule(TASKS[task][1]).modules_to_save["default"].weight
    routers = [p for name, p in model.named_parameters() if "router" in name and p.requires_grad]
    assert head.requires_grad
    assert routers
    before = head.detach().clone(), [p.detach().clone() for p in routers]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.train()(**batch, **TASKS[task][2]()).loss.backward()
    optimizer.step()
    assert not torch.equal(head, before[0])
    assert any(not torch.equal(p, old) for p, old in zip(routers, before[1], strict=True))
    expected = answers(model.eval(), batch)
    model.save_pretrained(tmp_path)
    for trains in (False, True):
        loaded = PeftModel.from_pretrained(base_of(task), str(tmp_path), is_trainable=trains).eval()
        assert type(loaded) is type(model)
        assert torch.equal(answers(loaded, batch), expected)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("task", TASKS)
def test_a_second_adapter_and_a_second_model_have_heads_too(zoo: Zoo, task: str, experts: str) -> None:
    config = config_of(zoo, task, experts)
    model = get_peft_model(base_of(task), config)
    named = list(model.peft_config["default"].modules_to_save)
    second = get_peft_model(base_of(task), config)
    head = TASKS[task][1]
    assert "default" in second.base_model.model.get_submodule(head).modules_to_save
    # PEFT extends the caller's list once more; the first model's own must not follow.
    assert model.peft_config["default"].modules_to_save == named
    model.add_adapter("other", config_of(zoo, task, experts))
    assert set(model.base_model.model.get_submodule(head).modules_to_save) == {"default", "other"}


@pytest.mark.parametrize("task", TASKS)
def test_a_refused_mixture_leaves_base_and_config_alone(zoo: Zoo, task: str) -> None:
    base = base_of(task)
    names, trains = set(base.state_dict()), {n: p.requires_grad for n, p in base.named_parameters()}
    config = config_of(zoo, task, "given", target_modules=["no_such_module"])
    with pytest.raises((PeftMoeError, ValueError)):
        get_peft_model(base, config)
    assert set(base.state_dict()) == names
    assert {n: p.requires_grad for n, p in base.named_parameters()} == trains
    if task != "SEQ_CLS":  # there PEFT names the head before it asks us
        assert config.modules_to_save is None


@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS"])
def test_modules_that_the_caller_names_stay(zoo: Zoo, task: str) -> None:
    model = get_peft_model(base_of(task), config_of(zoo, task, "fresh", modules_to_save=["pooler_of_mine"]))
    named = model.peft_config["default"].modules_to_save
    assert named[0] == "pooler_of_mine"
    assert TASKS[task][1] in named
