"""One batch, a mixture of its own for each row: ``adapter_names``, with every place of a router."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.batches import batch_for, logits_of, pad, texts
from support.routing import ROUTINGS, set_routers
from support.zoo import Zoo
from torch import Tensor, nn

from peft_moe import MoLoraConfig, PeftMoeError, routing_inputs
from peft_moe.routing.context import current_request
from peft_moe.routing.mixed_batch import mixed_batch, rows_of

NAMES = ["one", "__base__", "two", "one"]
LENGTHS = (9, 6, 8, 5)
# The same numbers from a product with fewer rows: float32, another order of summation.
FP32 = {"atol": 1e-5, "rtol": 1e-5}
PAIRS = [
    *((routing, "uniform") for routing in ROUTINGS if routing not in {"uniform", "random"}),
    ("dense", "block"),
    ("prompt-base", "token-probe"),
    ("token-base", "running-probe"),
    ("top2", "prompt-probe"),
]


def two(zoo: Zoo, first: str, second: str, architecture: str = "llama") -> PeftModel:
    task = None if architecture == "bert" else "SEQ_2_SEQ_LM" if architecture == "t5" else "CAUSAL_LM"
    experts = zoo.experts(architecture)
    # Another number of experts in another order, so that nothing fits both.
    others = {name: experts[name] for name in ("upper", "wide")}
    base = zoo.base(architecture)
    config = MoLoraConfig(experts=experts, task_type=task, **ROUTINGS[first])
    model = get_peft_model(base, config, adapter_name="one")
    model.add_adapter("two", MoLoraConfig(experts=others, task_type=task, **ROUTINGS[second]))
    for seed, adapter in enumerate(("one", "two")):
        set_routers(model, seed=seed, adapter=adapter)
    return model.eval()


def alone(model: PeftModel, batch: dict[str, Tensor]) -> list[Tensor]:
    """What each row of NAMES should give: the whole batch by one adapter, its row of it."""
    rows = []
    for row, name in enumerate(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(logits_of(model, batch)[row])
        else:
            model.set_adapter(name)
            rows.append(logits_of(model, batch)[row])
    return rows


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_each_row_follows_its_own(zoo: Zoo, first: str, second: str) -> None:
    model = two(zoo, first, second)
    batch = batch_for("llama", texts(lengths=LENGTHS))
    expected = alone(model, batch)
    model.set_adapter("two")  # what is active does not matter
    mixed = logits_of(model, {**batch, "adapter_names": NAMES})
    for row, (got, wanted) in enumerate(zip(mixed, expected, strict=True)):
        if NAMES[row] == "__base__":
            assert torch.equal(got, wanted)
        else:
            torch.testing.assert_close(got, wanted, **FP32)
    one, base, other = (expected[row] for row in (0, 1, 2))
    assert not torch.allclose(one, base, atol=1e-2)
    assert not torch.allclose(one, other, atol=1e-2)
    # Nothing is left of it.
    assert torch.equal(logits_of(model, batch)[2], expected[2])


@pytest.mark.parametrize("architecture", ["gpt2", "bert", "t5"])
def test_on_other_architectures(zoo: Zoo, architecture: str) -> None:
    model = two(zoo, "top2", "dense", architecture)
    batch = batch_for(architecture, texts(lengths=LENGTHS))
    expected = alone(model, batch)
    mixed = logits_of(model, {**batch, "adapter_names": NAMES})
    torch.testing.assert_close(mixed, torch.stack(expected), **FP32)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no-cache"]
)
@pytest.mark.parametrize(
    ("first", "second"), [("dense", "top2"), ("block", "prompt-base"), ("prompt-probe", "token-probe")]
)
def test_generation_follows_each_rows_own(zoo: Zoo, first: str, second: str, options: dict) -> None:
    model = two(zoo, first, second)
    prompt = pad(texts(lengths=LENGTHS), side="left")
    fixed = {"max_new_tokens": 6, "min_new_tokens": 6, **options}
    mixed = model.generate(**prompt, adapter_names=NAMES, **fixed)
    for adapter in ("one", "two"):
        model.set_adapter(adapter)
        separate = model.generate(**prompt, **fixed)
        rows = [row for row, name in enumerate(NAMES) if name == adapter]
        assert torch.equal(mixed[rows], separate[rows])
    with model.disable_adapter():
        assert torch.equal(mixed[1], model.generate(**prompt, **fixed)[1])


def test_generation_of_an_encoder_decoder(zoo: Zoo) -> None:
    model = two(zoo, "top2", "dense", "t5")
    prompt = pad(texts(lengths=LENGTHS))
    for options in ({}, {"num_beams": 3}):
        mixed = model.generate(**prompt, adapter_names=NAMES, max_new_tokens=5, min_new_tokens=5, **options)
        model.set_adapter("two")
        separate = model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, **options)
        assert torch.equal(mixed[2], separate[2])


def test_gates_of_the_caller_hold_for_their_rows(zoo: Zoo) -> None:
    model = two(zoo, "dense", "dense")
    model.add_adapter("three", MoLoraConfig(experts=zoo.experts("llama"), **ROUTINGS["block"]))
    batch = batch_for("llama", texts(lengths=(7, 7)))
    gates = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])
    with routing_inputs(gates=gates):
        mixed = logits_of(model, {**batch, "adapter_names": ["one", "three"]})
        model.set_adapter("three")
        torch.testing.assert_close(mixed, logits_of(model, batch), **FP32)  # the same experts, the same gates


def test_what_cannot_be_mixed_is_refused(zoo: Zoo) -> None:
    model = two(zoo, "uniform", "dense")
    batch = batch_for("llama", texts(lengths=LENGTHS))
    before = logits_of(model, batch)
    cases = {
        r"non-existing adapter\(s\): three.*one, two": (lambda: None, ["one", "three", "two", "one"]),
        "got 3 and 4 respectively": (lambda: None, ["one", "two", "one"]),
        "list with one adapter's name": (lambda: None, "one"),
        "training mode": (model.train, NAMES),
        "merged adapters": (lambda: model.eval().merge_adapter(["one"]), NAMES),
    }
    for message, (prepare, names) in cases.items():
        prepare()
        with pytest.raises(PeftMoeError, match=message):
            model(**batch, adapter_names=names)
    model.unmerge_adapter()
    # Merging and back rounds at 2^-24 of weights of size 1.
    torch.testing.assert_close(logits_of(model, batch), before, **FP32)


@pytest.mark.parametrize(
    ("layer", "rows", "message"),
    [
        ("layers.0.q_proj", 3, "3 rows where the batch has 2"),
        ("layers.0.mlp.experts.1.up", 4, "loose tokens"),
    ],
)
def test_rows_that_nobody_can_tell_apart_are_refused(layer: str, rows: int, message: str) -> None:
    names = ["__base__", "__base__"]
    with pytest.raises(PeftMoeError, match=rf"{layer}.*{message}.*set_adapter"):
        rows_of(names, "one", torch.zeros(rows, 5), layer)


def test_rows_of_beams_and_flat_tokens_stay_together() -> None:
    names = ["__base__", "__base__"]
    assert rows_of(names, "__base__", torch.zeros(2, 5), "q").tolist() == [0, 1]
    assert rows_of(names, "__base__", torch.zeros(6, 5), "q").tolist() == [0, 1, 2, 3, 4, 5]
    assert rows_of(names, "one", torch.zeros(6, 5), "q").tolist() == []


def test_the_call_inside_a_mixed_batch_knows_its_rows() -> None:
    with mixed_batch(nn.Identity().eval(), ["__base__", "__base__"], ()):
        assert current_request().row_adapters == ("__base__", "__base__")
    assert current_request().row_adapters is None
