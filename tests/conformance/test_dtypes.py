"""Bases in bfloat16 and in 4 bits, adapters of several dtypes, autocast.

Exactness of a narrow dtype is measured, not guessed: the float32 result on the same (rounded) weights
is the truth, PEFT's own error against it is the yardstick.
"""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.adapters import RECIPES
from support.batches import batch_for, labels_for, logits_of, texts
from support.routing import GATED, PAIRS, choose, routers
from support.zoo import Zoo, silence_below_tap
from torch import Tensor, nn

from peft_moe import PeftMoeError
from peft_moe.tuner.layers.linear import MoLoraLayer

EXPERTS = list(RECIPES)
SOME = [pair for pair in GATED if pair[0] in {"llama", "gpt2", "bert", "t5"}]

# Rounding is random: on 2·9·48 logits two equally good roundings differ by well under a half in RMS.
SLACK = 1.5


def rms(values: Tensor) -> float:
    return values.float().pow(2).mean().sqrt().item()


def rounded(zoo: Zoo, name: str) -> nn.Module:
    """The base with weights that bfloat16 holds, kept in float32."""
    return zoo.base(name).bfloat16().float()


@pytest.mark.parametrize(("name", "routing"), SOME)
def test_one_hot_gates_on_a_bf16_base_err_as_peft_does(zoo: Zoo, name: str, routing: str) -> None:
    batch = batch_for(name, texts())
    model = zoo.mixture(name, routing, base=zoo.base(name).bfloat16())
    choose(model, 0)
    truth, plain = (
        zoo.lora(name, EXPERTS[0], base) for base in (rounded(zoo, name), zoo.base(name).bfloat16())
    )
    for lora in (truth, plain):
        silence_below_tap(lora, model, name)
    exact, peft, ours = (logits_of(m, batch) for m in (truth, plain, model))
    assert ours.dtype == peft.dtype == torch.bfloat16
    assert rms(ours - exact) <= SLACK * rms(peft - exact)


@pytest.mark.parametrize(("name", "routing"), [p for p in PAIRS if p[0] in {"llama", "gpt2", "bert", "t5"}])
def test_disabled_on_a_bf16_base_is_the_base_bit_for_bit(zoo: Zoo, name: str, routing: str) -> None:
    batch = batch_for(name, texts())
    model = zoo.mixture(name, routing, base=zoo.base(name).bfloat16())
    expected = logits_of(zoo.base(name).bfloat16(), batch)
    assert not torch.equal(logits_of(model, batch), expected)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, batch), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("routing", [r for n, r in SOME if n == "llama"])
def test_one_hot_gates_under_autocast_err_as_peft_does(zoo: Zoo, routing: str, dtype: torch.dtype) -> None:
    batch = batch_for("llama", texts())
    model = zoo.mixture("llama", routing)
    choose(model, 0)
    plain = zoo.lora("llama", EXPERTS[0])
    silence_below_tap(plain, model, "llama")
    exact = logits_of(plain, batch)
    with torch.autocast("cpu", dtype):
        peft, ours = logits_of(plain, batch), logits_of(model, batch)
    assert ours.dtype == peft.dtype
    assert 0 < rms(ours - exact) <= SLACK * rms(peft - exact)


@pytest.mark.parametrize(
    "cast", [nn.Module.bfloat16, nn.Module.half, nn.Module.double], ids=["bf16", "half", "double"]
)
@pytest.mark.parametrize("routing", ["dense", "random", "block", "token-probe", "prompt-base"])
def test_routers_stay_float32_through_casts(zoo: Zoo, routing: str, cast) -> None:
    model = zoo.mixture("llama", routing)
    before = {n: p.clone() for _, r in routers(model) for n, p in r.named_parameters()}
    cast(model)
    after = {n: p for _, r in routers(model) for n, p in r.named_parameters()}
    assert before
    assert all(after[n].dtype == torch.float32 and torch.equal(after[n], p) for n, p in before.items())
    assert logits_of(model, batch_for("llama", texts())).isfinite().all()


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=["base-fp32", "base-bf16"])
@pytest.mark.parametrize("dtypes", [("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "bf16")], ids="-".join)
def test_experts_keep_their_numbers_whatever_the_dtypes(
    zoo: Zoo, dtypes: tuple[str, str], base_dtype: torch.dtype, tmp_path
) -> None:
    known = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    folders = {
        f"{label}_{dtype}": zoo.adapter("llama", f"{label}-{dtype}", RECIPES[label], known[dtype])
        for label, dtype in zip(("wide", "narrow"), dtypes, strict=True)
    }
    model = zoo.mixture("llama", "dense", base=zoo.base("llama").to(base_dtype), experts=folders)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(zoo.base("llama").to(base_dtype), str(tmp_path)).eval()
    for candidate in (model, loaded):
        for layer in candidate.modules():
            if isinstance(layer, MoLoraLayer):
                _assert_factors(layer, folders)
    batch = batch_for("llama", texts())
    assert torch.equal(logits_of(model, batch), logits_of(loaded, batch))


def _assert_factors(layer: MoLoraLayer, folders: dict[str, str]) -> None:
    stored = {}
    for index, folder in enumerate(folders.values()):
        tensors = load_file(f"{folder}/adapter_model.safetensors")
        keys = [f"base_model.model.{layer.name}.lora_{side}.weight" for side in "AB"]
        if keys[0] in tensors:
            stored[index] = [tensors[key] for key in keys]
    # A layer holds the widest dtype of its experts, which represents each of them exactly.
    dtypes = {tensor.dtype for pair in stored.values() for tensor in pair}
    widest = dtypes.pop() if len(dtypes) == 1 else torch.float32
    for index, pair in stored.items():
        for factor, original in zip(layer.expert_factors("default", index), pair, strict=True):
            assert factor.dtype == widest
            assert torch.equal(factor.to(original.dtype), original)
            assert torch.equal(factor.float(), original.float())


@pytest.mark.parametrize("routing", [r for n, r in GATED if n == "llama"])
def test_nf4_base(zoo: Zoo, four_bit, routing: str, tmp_path) -> None:
    batch = batch_for("llama", texts())
    bare = logits_of(four_bit(), batch)
    assert not torch.allclose(bare, logits_of(zoo.base("llama"), batch), atol=1e-3)  # it is quantised
    model = zoo.mixture("llama", routing, base=four_bit())
    mixed = logits_of(model, batch)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, batch), bare)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(four_bit(), str(tmp_path)).eval()
    assert torch.equal(logits_of(loaded, batch), mixed)
    choose(model, 0)
    plain = zoo.lora("llama", EXPERTS[0], four_bit())
    silence_below_tap(plain, model, "llama")
    # The same float32 sums as on a plain base: the quantised layers give both the same base output.
    torch.testing.assert_close(logits_of(model, batch), logits_of(plain, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("first", ["train", "eval", "save"])
@pytest.mark.parametrize("routing", ["dense", "block", "token-probe", "prompt-soft"])
def test_nf4_base_trains_routers_whatever_came_before(
    zoo: Zoo, four_bit, routing: str, first: str, tmp_path
) -> None:
    """An eval pass or a save must not change the weights, nor cut the gradients through them."""
    model = zoo.mixture("llama", routing, base=four_bit())
    batch = batch_for("llama", texts())
    if first != "train":
        logits_of(model, batch)
    if first == "save":
        model.save_pretrained(str(tmp_path))
    model.train()(**batch, labels=labels_for("llama", batch)).loss.backward()
    fresh = zoo.mixture("llama", routing, base=four_bit()).train()
    fresh(**batch, labels=labels_for("llama", batch)).loss.backward()
    expected = {n: p.grad for n, p in fresh.named_parameters() if p.grad is not None}
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    assert expected
    assert all(
        "molora_router" in n and torch.equal(g, expected[n]) and g.abs().max() > 0 for n, g in found.items()
    )


def test_a_packed_nf4_base_cannot_train(zoo: Zoo, four_bit) -> None:
    base = four_bit()
    base.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(PeftMoeError, match="load the base again"):
        zoo.mixture("llama", "dense", base=base)
    zoo.mixture("llama", "dense", base=base, inference_mode=True)


def test_nf4_base_merges_constant_gates_no_worse_than_peft(zoo: Zoo, four_bit) -> None:
    batch = batch_for("llama", texts())
    experts = {"wide": zoo.experts("llama")["wide"]}
    model = zoo.mixture("llama", "uniform", base=four_bit(), experts=experts)
    exact = logits_of(model, batch)
    plain = zoo.lora("llama", "wide", four_bit())
    ours, peft = (logits_of(m.merge_and_unload(), batch) for m in (model, plain))
    # Both round the merged weight to 4 bits again; the same rounding of the same sum.
    assert rms(ours - exact) <= SLACK * rms(peft - exact)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_bf16_adapters_on_a_float32_base_lose_nothing(zoo: Zoo, name: str) -> None:
    """PEFT widens them to float32; ours stay as they are, and are widened in the product."""
    batch = batch_for(name, texts())
    folder = zoo.adapter(name, "wide-in-bf16", RECIPES["wide"], torch.bfloat16)
    model = zoo.mixture(
        name,
        "dense",
        experts={"a": folder, "b": zoo.adapter(name, "narrow-in-bf16", RECIPES["narrow"], torch.bfloat16)},
    )
    choose(model, 0)
    plain = PeftModel.from_pretrained(zoo.base(name), folder).eval()
    torch.testing.assert_close(logits_of(model, batch), logits_of(plain, batch), atol=1e-5, rtol=1e-5)
    kinds = {m.molora_A["default"].weight.dtype for m in model.modules() if isinstance(m, MoLoraLayer)}
    assert kinds == {torch.bfloat16}
