"""What must be equal, over architectures and routings: the table of the design's section 6.

Models are tiny, weights random and adapters strong, so that a wrong gate, scale, expert or token moves
logits by 0.1 and more; every tolerance is five orders below that.
"""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.adapters import RECIPES
from support.bases import ARCHITECTURES
from support.batches import batch_for, logits_of, real_logits, texts
from support.routing import (
    GATED,
    PAIRS,
    ROUTINGS,
    choose,
    permute_columns,
    routers,
)
from support.zoo import Zoo, silence_below_tap

from peft_moe import PeftMoeError, record_routing
from peft_moe.tuner.layers.linear import MoLoraLayer

# float32 against float32 along another order of summation: logits of size 3 hold about 1e-6.
FP32 = {"atol": 1e-5, "rtol": 1e-5}
# Different numbers must differ by far more than FP32, else an equality proves nothing.
MOVED = 1e-2

# Routings whose preset leaves all experts on, and that several layers share.
SHARED = [pair for pair in GATED if pair[1] in {"block", "token-probe", "token-base", "prompt-soft"}]
NULL = {"null_expert": True}
EXPERTS = list(RECIPES)


def apart(left: torch.Tensor, right: torch.Tensor) -> float:
    return (left - right).abs().max().item()


@pytest.mark.parametrize(("name", "routing"), PAIRS)
def test_disabled_adapters_are_the_base_bit_for_bit(zoo: Zoo, name: str, routing: str) -> None:
    batch = batch_for(name, texts())
    expected = logits_of(zoo.base(name), batch)
    model = zoo.mixture(name, routing)
    mixed = logits_of(model, batch)
    assert apart(mixed, expected) > MOVED
    with model.disable_adapter():
        assert torch.equal(logits_of(model, batch), expected)
    assert torch.equal(logits_of(model, batch), mixed)


@pytest.mark.parametrize(("name", "routing"), GATED)
def test_one_hot_gates_are_peft_with_that_adapter(zoo: Zoo, name: str, routing: str) -> None:
    batch = batch_for(name, texts())
    bare = logits_of(zoo.base(name), batch)
    model = zoo.mixture(name, routing)
    for index, expert in enumerate(EXPERTS):
        choose(model, index)
        plain = zoo.lora(name, expert)
        silence_below_tap(plain, model, name)
        expected = logits_of(plain, batch)
        assert apart(expected, bare) > MOVED
        torch.testing.assert_close(logits_of(model, batch), expected, **FP32)


@pytest.mark.parametrize(("name", "routing"), GATED)
def test_null_expert_alone_is_the_base(zoo: Zoo, name: str, routing: str) -> None:
    batch = batch_for(name, texts())
    model = zoo.mixture(name, routing, **NULL)
    choose(model, len(EXPERTS))
    # Gates of exactly 0 add exact zeros.
    assert torch.equal(logits_of(model, batch), logits_of(zoo.base(name), batch))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_uniform_gates_are_one_concatenated_lora_and_merged_weights(zoo: Zoo, name: str) -> None:
    batch = batch_for(name, texts())
    model = zoo.mixture(name, "uniform")
    mixed = logits_of(model, batch)
    plain = zoo.lora(name, EXPERTS[0])
    for expert in EXPERTS[1:]:
        plain.load_adapter(zoo.experts(name)[expert], adapter_name=expert)
    share = [1 / len(EXPERTS)] * len(EXPERTS)
    plain.add_weighted_adapter(["default", *EXPERTS[1:]], share, "all", combination_type="cat")
    plain.set_adapter("all")
    torch.testing.assert_close(mixed, logits_of(plain, batch), **FP32)
    merged = model.merge_and_unload()
    assert not any("molora" in key or "router" in key for key in merged.state_dict())
    torch.testing.assert_close(logits_of(merged, batch), mixed, **FP32)


@pytest.mark.parametrize(("name", "routing"), GATED)
def test_identical_experts_are_one_expert(zoo: Zoo, name: str, routing: str) -> None:
    batch = batch_for(name, texts())
    folder = zoo.experts(name)["wide"]
    # Without a null expert any gates sum to 1.
    with pytest.warns(UserWarning, match="router cannot tell them apart"):
        model = zoo.mixture(name, routing, experts={"a": folder, "b": folder, "c": folder}, null_expert=False)
    plain = zoo.lora(name, "wide")
    silence_below_tap(plain, model, name)
    torch.testing.assert_close(logits_of(model, batch), logits_of(plain, batch), **FP32)


@pytest.mark.parametrize(
    ("name", "routing"), [p for p in GATED if ROUTINGS[p[1]] == {"router": "linear"}] + SHARED
)
def test_top_k_of_all_experts_is_dense(zoo: Zoo, name: str, routing: str) -> None:
    batch = batch_for(name, texts())
    expected = logits_of(zoo.mixture(name, routing), batch)
    columns = len(EXPERTS) + bool(ROUTINGS[routing].get("null_expert"))
    assert torch.equal(logits_of(zoo.mixture(name, routing, top_k=columns), batch), expected)
    assert apart(logits_of(zoo.mixture(name, routing, top_k=2), batch), expected) > MOVED


@pytest.mark.parametrize(("name", "routing"), PAIRS)
def test_order_of_experts_does_not_matter(zoo: Zoo, name: str, routing: str) -> None:
    batch = batch_for(name, texts())
    order = [2, 0, 1]
    folders = zoo.experts(name)
    model = zoo.mixture(name, routing)
    other = zoo.mixture(name, routing, experts={EXPERTS[i]: folders[EXPERTS[i]] for i in order})
    expected = logits_of(model, batch)
    if routing != "uniform":
        assert apart(logits_of(other, batch), expected) > MOVED  # the router's rows still in the old order
    permute_columns(other, order)
    torch.testing.assert_close(logits_of(other, batch), expected, **FP32)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("name", "routing"), PAIRS)
def test_padding_and_company_change_nothing(zoo: Zoo, name: str, routing: str, side: str) -> None:
    rows = texts(lengths=(9, 6, 4))
    model = zoo.mixture(name, routing)
    alone = [real_logits(name, model, batch_for(name, [row]))[0] for row in rows]
    together = real_logits(name, model, batch_for(name, rows, side, extra=3))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(other, one, **FP32)


@pytest.mark.parametrize(("name", "routing"), PAIRS)
def test_saved_and_loaded_is_bit_identical(zoo: Zoo, name: str, routing: str, tmp_path) -> None:
    batch = batch_for(name, texts())
    model = zoo.mixture(name, routing, seed=5)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(zoo.base(name), str(tmp_path)).eval()
    assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))
    # Once more: a file made from a loaded model is the same file.
    loaded.save_pretrained(str(tmp_path / "again"))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


@pytest.mark.parametrize("reload", [False, True], ids=["injected", "loaded"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_experts_come_out_as_they_went_in(zoo: Zoo, name: str, reload: bool, tmp_path) -> None:
    model = zoo.mixture(name, "dense")
    if reload:
        model.save_pretrained(str(tmp_path))
        model = PeftModel.from_pretrained(zoo.base(name), str(tmp_path))
    layers = {m.name: m for m in model.modules() if isinstance(m, MoLoraLayer)}
    for index, expert in enumerate(EXPERTS):
        tensors = load_file(f"{zoo.experts(name)[expert]}/adapter_model.safetensors")
        found = 0
        for module, layer in layers.items():
            factors = layer.expert_factors("default", index)
            keys = [f"base_model.model.{module}.lora_{side}.weight" for side in "AB"]
            assert (factors is None) == (keys[0] not in tensors)
            if factors is not None:
                assert all(torch.equal(f, tensors[key]) for f, key in zip(factors, keys, strict=True))
                found += 2
        assert found == len(tensors)


@pytest.mark.parametrize(
    "fields", [{"router_scope": "block"}, {"router_scope": "model"}, {"router": "context"}]
)
def test_one_decision_for_two_texts_is_refused(zoo: Zoo, fields: dict) -> None:
    with pytest.raises(PeftMoeError, match="use router_scope='module'"):
        zoo.mixture("t5", "dense", **fields)


@pytest.mark.parametrize(("name", "routing"), GATED)
def test_the_gates_of_these_tests_are_not_trivial(zoo: Zoo, name: str, routing: str) -> None:
    """All the others lean on it: gates are neither uniform nor one-hot by themselves, and differ by row."""
    model = zoo.mixture(name, routing)
    with record_routing() as record:
        logits_of(model, batch_for(name, texts(lengths=(9, 6, 4))))
    assert len(record.decisions) == len(list(routers(model)))
    gates = torch.cat([decision.gates.flatten(0, 1) for decision in record.decisions.values()])
    assert gates.std(0).max() > 0.05
    if ROUTINGS[routing]["router"] != "context":
        assert 0.4 < gates.max(-1).values.mean() < 0.95
