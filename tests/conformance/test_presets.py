"""Every named method on real bases: saved and loaded bit for bit, in float32, bfloat16 and four bits."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.batches import batch_for, labels_for, logits_of, texts
from support.routing import routers
from support.zoo import Zoo
from torch import Tensor, nn

from peft_moe import MoLoraConfig, PeftMoeError, record_routing, routing_inputs
from peft_moe.routers import PRESETS
from peft_moe.tuner.layers.linear import MoLoraLayer

DOMAINS = torch.tensor([1, 0])
# float32 along another order of summation.
FP32 = {"atol": 1e-5, "rtol": 1e-5}
LORA = {"r": 4, "lora_alpha": 8, "init_weights": False, "target_modules": ["q_proj", "up_proj"]}


def architecture_of(preset: str) -> str:
    """An encoder for what a causal model must not do."""
    return "bert" if PRESETS[preset].fields.get("topk_method") == "expert_choice" else "llama"


def make(zoo: Zoo, preset: str, base: nn.Module | None = None, **fields: Any) -> PeftModel:
    """The preset with random state: trained weights, fitted prototypes, balancing biases."""
    name = architecture_of(preset)
    base = zoo.base(name) if base is None else base
    experts: dict[str, Any] = {"experts": zoo.experts(name)}
    if "experts_per_layer" in PRESETS[preset].fields:
        experts = {"experts": 3, "experts_per_layer": [2, 3], **LORA}
    config = MoLoraConfig(router=preset, **experts, **fields)
    torch.manual_seed(0)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for _, router in routers(model):
            for tensor in router.state_dict().values():
                tensor.add_(torch.randn(tensor.shape) * 0.5)
    return model


def outputs(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    torch.manual_seed(0)  # for what is drawn in every call
    with routing_inputs(domains=DOMAINS):
        return logits_of(model, batch)


def check_round_trip(zoo: Zoo, preset: str, folder: str, base: Callable[[], nn.Module]) -> None:
    batch = batch_for(architecture_of(preset), texts())
    model = make(zoo, preset, base())
    expected = outputs(model, batch)
    assert torch.isfinite(expected).all()
    assert not torch.equal(expected, logits_of(base(), batch))
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(base(), folder).eval()
    assert torch.equal(outputs(loaded, batch), expected)
    for (name, router), (_, other) in zip(routers(model), routers(loaded), strict=True):
        assert router.state_dict().keys() == other.state_dict().keys()
        for key, tensor in router.state_dict().items():
            assert torch.equal(other.state_dict()[key], tensor), f"{name}.{key}"
            assert tensor.dtype == torch.float32


@pytest.mark.parametrize("preset", PRESETS)
def test_round_trip(zoo: Zoo, preset: str, tmp_path) -> None:
    check_round_trip(zoo, preset, str(tmp_path), lambda: zoo.base(architecture_of(preset)))


@pytest.mark.parametrize("preset", PRESETS)
def test_round_trip_on_a_bf16_base(zoo: Zoo, preset: str, tmp_path) -> None:
    check_round_trip(zoo, preset, str(tmp_path), lambda: zoo.base(architecture_of(preset)).bfloat16())


@pytest.mark.parametrize("preset", [p for p in PRESETS if architecture_of(p) == "llama"])
def test_round_trip_on_a_4_bit_base(zoo: Zoo, four_bit, preset: str, tmp_path) -> None:
    check_round_trip(zoo, preset, str(tmp_path), four_bit)


@pytest.mark.parametrize("preset", PRESETS)
def test_trains_what_it_should(zoo: Zoo, preset: str) -> None:
    """A backward pass reaches every weight of a trainable router, and nothing of a frozen one."""
    name = architecture_of(preset)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nobody adds the preset's auxiliary losses here
        model = make(zoo, preset).train()
        batch = batch_for(name, texts())
        labels = labels_for(name, batch)
        with routing_inputs(domains=DOMAINS):
            loss = model(**batch, labels=labels).loss
        if loss.requires_grad:
            loss.backward()
    found = dict(routers(model))
    assert found
    for path, router in found.items():
        for key, parameter in router.named_parameters():
            assert parameter.requires_grad == router.trainable, f"{path}.{key}"
    if next(iter(found.values())).trainable:
        reached = [
            p.grad is not None and bool(p.grad.abs().max() > 0)
            for r in found.values()
            for p in r.parameters()
        ]
        assert sum(reached) > 0.9 * len(reached)  # a top-1 expert of a layer may get no token of 15


def test_given_gates_ask_no_router(zoo: Zoo) -> None:
    """One-hot rows are each row's own adapter, whatever the router thinks; also in generation."""
    batch = batch_for("llama", texts(lengths=(8, 8)))
    names = list(zoo.experts("llama"))
    for routing in ("dense", "block", "prompt-probe", "token-probe", "prompt-module"):
        model = zoo.mixture("llama", routing)
        with record_routing() as record, routing_inputs(gates=torch.eye(3)[[2, 0]]):
            mixed = logits_of(model, batch)
        assert not record.decisions
        for row, expert in enumerate((names[2], names[0])):
            alone = logits_of(zoo.lora("llama", expert), batch)[row]
            torch.testing.assert_close(mixed[row], alone, **FP32)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2, "do_sample": False}
    with routing_inputs(gates=torch.eye(3)[[2, 0]]):
        ids = model.generate(**{k: batch[k] for k in ("input_ids", "attention_mask")}, **options)
    for row, expert in enumerate((names[2], names[0])):
        prompt = {k: batch[k][row : row + 1] for k in ("input_ids", "attention_mask")}
        assert torch.equal(zoo.lora("llama", expert).generate(**prompt, **options)[0], ids[row])


@pytest.mark.parametrize("gates", [torch.ones(3), torch.ones(2, 2), torch.ones(3, 3)])
def test_gates_of_another_shape_are_refused(zoo: Zoo, gates: Tensor) -> None:
    batch = batch_for("llama", texts())
    with routing_inputs(gates=gates), pytest.raises(PeftMoeError, match="gates"):
        logits_of(zoo.mixture("llama", "dense"), batch)


def test_labels_of_the_call_reach_every_beam(zoo: Zoo) -> None:
    batch = batch_for("llama", texts(lengths=(8, 8)))
    model = make(zoo, "oracle")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2, "do_sample": False}
    prompt = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with routing_inputs(domains=DOMAINS):
        by_label = model.generate(**prompt, **options)
    with routing_inputs(gates=torch.eye(3)[DOMAINS]):
        by_gates = model.generate(**prompt, **options)
    assert torch.equal(by_label, by_gates)
    with (
        routing_inputs(domains=torch.tensor([0])),
        pytest.raises(PeftMoeError, match="domains has 1 entries"),
    ):
        model(**prompt)


@pytest.mark.parametrize("preset", ["static", "cat", "lorahub", "sum", "uniform"])
def test_gates_that_read_nothing_are_merged(zoo: Zoo, preset: str) -> None:
    batch = batch_for("llama", texts())
    model = make(zoo, preset)
    expected = outputs(model, batch)
    torch.testing.assert_close(logits_of(model.merge_and_unload(), batch), expected, **FP32)


def test_lorahub_has_one_set_of_weights_and_cat_one_per_module(zoo: Zoo) -> None:
    assert len(list(routers(make(zoo, "lorahub")))) == 1
    layers = [m for m in make(zoo, "cat").modules() if isinstance(m, MoLoraLayer)]
    assert len(list(routers(make(zoo, "cat")))) == len(layers) > 1


def test_experts_and_top_k_per_layer(zoo: Zoo) -> None:
    """Three layers in groups of one: ranks, router columns and gates follow the counts."""
    config = MoLoraConfig(
        experts=4, experts_per_layer=[1, 2, 4], top_k_per_layer=[1, 1, 3], norm_topk_prob=False, **LORA
    )
    model = get_peft_model(zoo.base("llama"), config).eval()
    with record_routing() as record:
        logits_of(model, batch_for("llama", texts()))
    for layer in (m for m in model.modules() if isinstance(m, MoLoraLayer)):
        index = int(layer.name.split(".")[2])
        count, k = [1, 2, 4][index], [1, 1, 3][index]
        assert layer.mixtures["default"].rank_map.ranks == (4,) * count + (0,) * (4 - count)
        assert layer.molora_A["default"].weight.shape[0] == 4 * count
        gates = record.decisions[layer.name].gates
        assert ((gates > 0).sum(-1) == k).all()
        assert (gates[..., count:] == 0).all()


def test_more_groups_than_layers_are_refused(zoo: Zoo) -> None:
    config = MoLoraConfig(experts=4, top_k_per_layer=[2, 3, 3, 2], **LORA)
    with pytest.raises(PeftMoeError, match=r"top_k_per_layer=\[2, 3, 3, 2\] has 4 groups for the 3 layers"):
        get_peft_model(zoo.base("llama"), config)


def test_a_shared_expert_is_always_on(zoo: Zoo) -> None:
    """With the null expert chosen for the rest, the mixture is PEFT with the shared adapter."""
    batch = batch_for("llama", texts())
    names = list(zoo.experts("llama"))
    model = zoo.mixture("llama", "dense", shared_experts=[names[1]], null_expert=True)
    with torch.no_grad():
        for _, router in routers(model):
            assert router.settings.num_columns == 3
            router.scorer.weight.zero_()
            router.scorer.bias.copy_(torch.tensor([-1e4, -1e4, 0.0]))
    torch.testing.assert_close(logits_of(model, batch), logits_of(zoo.lora("llama", names[1]), batch), **FP32)


def test_a_causal_base_without_task_type_refuses_expert_choice(zoo: Zoo) -> None:
    config = MoLoraConfig(router="expert_choice", experts=zoo.experts("llama"))
    with pytest.raises(PeftMoeError, match="its own future"):
        get_peft_model(zoo.base("llama"), config)
