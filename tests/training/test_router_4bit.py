"""Routers on a 4-bit base, through TRL: they stay float32, and every step reaches all of their values."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from support.routing import routers
from support.training import KeepGradients, joined, make_trainer, router_values, samples, tokenizer
from support.zoo import Zoo

from peft_moe import MoLoraConfig

pytest.importorskip("bitsandbytes")

from transformers import AutoModelForCausalLM, BitsAndBytesConfig

DATA = Dataset.from_list(samples(8))
ROUTINGS: dict[str, dict[str, Any]] = {
    "top2": {"router": "linear", "top_k": 2},
    "context": {"router": "context", "router_label_loss_coef": 1.0},
}


def nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


@pytest.fixture(scope="module")
def saved(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    zoo.base("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def build(zoo: Zoo, saved: str, routing: str, folder: Path, *, ready: bool = False, **settings: Any) -> Any:
    """A trainer from a path and a config, or (``ready``) from a model that carries the mixture already."""
    fields = ROUTINGS[routing]
    given: dict[str, Any] = {"eval_dataset": DATA, "callbacks": [KeepGradients()]}
    if ready:
        base = AutoModelForCausalLM.from_pretrained(saved, quantization_config=nf4(), dtype=torch.float32)
        name = "prompt-probe" if routing == "context" else routing
        coefficients = {k: v for k, v in fields.items() if k.endswith("coef")}
        model: Any = zoo.mixture("llama", name, base=base, **coefficients)
    else:
        config = MoLoraConfig(experts=zoo.experts("llama"), task_type="CAUSAL_LM", **fields)
        given |= {"peft_config": config, "quantization_config": nf4(), "processing_class": None}
        settings = {"model_init_kwargs": {"dtype": "float32"}, **settings}
        model = saved
    return make_trainer("sft", model, DATA, folder, given=given, **settings)


def dtypes(model: Any) -> set[torch.dtype]:
    return {p.dtype for _, router in routers(model) for p in router.parameters()}


@pytest.mark.parametrize("ready", [False, True], ids=["path", "ready"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_value_moves_at_a_small_learning_rate(
    zoo: Zoo, saved: str, tmp_path: Path, routing: str, ready: bool
) -> None:
    """TRL casts what trains on a 4-bit base to bf16, where most steps of 1e-4 round to nothing."""
    untouched = router_values(zoo.mixture("llama", "top2" if routing == "top2" else "prompt-probe"))
    settings = {"max_steps": 5, "learning_rate": 1e-4}
    trainer = build(zoo, saved, routing, tmp_path, ready=ready, **settings)
    assert trainer.model.is_loaded_in_4bit
    assert dtypes(trainer.model) == {torch.float32}
    before = router_values(trainer.model)
    if ready:
        assert torch.equal(before, untouched)  # nor were they rounded on the way through bf16
    trainer.train()
    assert dtypes(trainer.model) == {torch.float32}
    moved = (router_values(trainer.model) - before).abs()
    # Adam goes about 1e-4 a step, back and forth at times; a bf16 value of 0.1 moves by 5e-4 or not at all.
    assert (moved > 0).all()
    assert 1e-4 < moved.max() < 1e-3


@pytest.mark.parametrize("routing", ROUTINGS)
def test_evaluating_first_leaves_the_gradients_as_they_are(
    zoo: Zoo, saved: str, tmp_path: Path, routing: str
) -> None:
    """On AVX512-BF16 CPUs an eval pass once repacked the weights, and gradients through them vanished."""
    steps = []
    for evaluate_first in (False, True):
        trainer = build(zoo, saved, routing, tmp_path, ready=True, max_steps=1)
        if evaluate_first:
            trainer.evaluate()
        trainer.train()
        keep = next(c for c in trainer.callback_handler.callbacks if isinstance(c, KeepGradients))
        steps.append(keep.steps[0])
    assert all(gradient.abs().max() > 0 for gradient in steps[0].values())
    # The same sums in the same order.
    torch.testing.assert_close(joined(steps[1]), joined(steps[0]), atol=1e-7, rtol=1e-5)


def test_a_mixture_knows_which_precision_it_was_made_on(zoo: Zoo, saved: str, tmp_path: Path) -> None:
    def base(**kwargs: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32, **kwargs)

    zoo.mixture("llama", "top2", base=base(quantization_config=nf4())).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(base(quantization_config=nf4()), tmp_path)
    assert model.peft_config["default"].base_precision == "bitsandbytes nf4"
    with pytest.warns(UserWarning, match="'bitsandbytes nf4', and this base has 'full'"):
        model = PeftModel.from_pretrained(base(), tmp_path)
    assert model.peft_config["default"].base_precision == "full"
