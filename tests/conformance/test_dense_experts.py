"""Experts of full rank: all of a fine-tuned model's change, beside low-rank experts in one mixture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.bases import BASES
from support.batches import batch_for, logits_of, texts
from support.routing import choose
from support.zoo import Zoo

from peft_moe import PeftMoeError
from peft_moe.experts.base_modules import linear_sizes
from peft_moe.experts.extraction.extract import extract_adapter

# W + ΔW is rounded once in the model, and never in the mixture; then float32 in another order.
FP32 = {"atol": 2e-5, "rtol": 2e-5}
MOVED = 1e-2


def full_model(zoo: Zoo, name: str, folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """The base with a change of full rank in every linear layer of its blocks."""
    model = zoo.base(name)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module_name, module in model.named_modules():
            if linear_sizes(module) is not None and module_name.endswith(tuple(BASES[name].linears)):
                module.weight.add_(0.05 * torch.randn(module.weight.shape, generator=generator))
    model.to(dtype).save_pretrained(str(folder))
    return str(folder)


def dense(zoo: Zoo, name: str, folder: Path) -> tuple[str, str]:
    """The full model, and the adapter that holds all of its change."""
    full = full_model(zoo, name, folder / "full")
    report = extract_adapter(zoo.saved_base(name), full, folder / "dense", dense=True, progress=False)
    assert all(layer.rank == min(layer.shape) and layer.relative_error == 0 for layer in report.layers)
    return full, str(folder / "dense")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_hot_gates_are_the_source_model(zoo: Zoo, name: str, tmp_path: Path) -> None:
    full, folder = dense(zoo, name, tmp_path)
    batch = batch_for(name, texts())
    source = logits_of(type(zoo.base(name)).from_pretrained(full).eval(), batch)
    low = zoo.experts(name)
    for routing, mixing in [("dense", "linear"), ("top2", "linear"), ("dense", "block"), ("top2", "block")]:
        experts = {"wide": low["wide"], "full": folder, "narrow": low["narrow"]}
        model = zoo.mixture(name, routing, experts=experts, mixing=mixing, allow_base_mismatch=True)
        mixed = logits_of(model, batch)
        choose(model, 1)
        torch.testing.assert_close(logits_of(model, batch), source, **FP32)
        assert (mixed - source).abs().max() > MOVED
        choose(model, 0)
        torch.testing.assert_close(logits_of(model, batch), logits_of(zoo.lora(name, "wide"), batch), **FP32)
    assert (source - logits_of(zoo.base(name), batch)).abs().max() > MOVED
    plain = PeftModel.from_pretrained(zoo.base(name), folder).eval()
    torch.testing.assert_close(logits_of(plain, batch), source, **FP32)


def test_the_change_is_kept_to_the_bit_and_has_a_digest(zoo: Zoo, tmp_path: Path) -> None:
    full, folder = dense(zoo, "llama", tmp_path)
    tensors = load_file(f"{folder}/adapter_model.safetensors")
    base, other = zoo.base("llama"), type(zoo.base("llama")).from_pretrained(full)
    for name in ("mlp.gate_proj", "mlp.down_proj", "self_attn.k_proj"):
        wanted = (
            other.get_submodule(f"model.layers.1.{name}").weight
            - base.get_submodule(f"model.layers.1.{name}").weight
        )
        A, B = (tensors[f"base_model.model.model.layers.1.{name}.lora_{side}.weight"] for side in "AB")
        assert torch.equal(B @ A, wanted)
    experts = {"wide": zoo.experts("llama")["wide"], "full": folder}
    model = zoo.mixture("llama", "top2", experts=experts, mixing="block", allow_base_mismatch=True)
    assert all(record["digest"].startswith("float32:") for record in model.peft_config["default"].records())
    assert not any(p.requires_grad for n, p in model.named_parameters() if "molora_A" in n or "molora_B" in n)
    batch = batch_for("llama", texts())
    model.save_pretrained(str(tmp_path / "mixture"))
    loaded = PeftModel.from_pretrained(zoo.base("llama"), str(tmp_path / "mixture")).eval()
    assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))


def test_16_bits_lose_nothing(zoo: Zoo, tmp_path: Path) -> None:
    """The difference of two models in bf16 is exact in float32; no SVD stands between."""
    zoo.base("llama").bfloat16().save_pretrained(str(tmp_path / "base"))
    full = full_model(zoo, "llama", tmp_path / "full", torch.bfloat16)
    extract_adapter(tmp_path / "base", full, tmp_path / "dense", dense=True, progress=False)
    kind = type(zoo.base("llama"))
    base, other = (
        kind.from_pretrained(f, dtype=torch.float32).eval() for f in (str(tmp_path / "base"), full)
    )
    experts = {"full": str(tmp_path / "dense"), "wide": zoo.experts("llama")["wide"]}
    model = zoo.mixture(
        "llama", "dense", base=base, experts=experts, mixing="block", allow_base_mismatch=True
    )
    choose(model, 0)
    batch = batch_for("llama", texts())
    torch.testing.assert_close(logits_of(model, batch), logits_of(other, batch), **FP32)


@pytest.mark.parametrize("other", [{"rank": 4}, {"energy": 0.9}, {"max_rank": 8}])
def test_dense_beside_a_rank_is_refused(tmp_path: Path, other: dict) -> None:
    with pytest.raises(PeftMoeError, match=f"{next(iter(other))}=.* has no effect with dense=True"):
        extract_adapter("a", "b", tmp_path / "out", dense=True, progress=False, **other)
