"""Bases that are larger than the GPU: accelerate keeps weights elsewhere and brings them for each call."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peft_moe import PeftMoeError
from peft_moe.tuner.layers.linear import MoLoraLayer

IDS = torch.tensor([[5, 9, 3, 7, 11]])
KINDS = {
    "linear": {"router": "linear", "top_k": 2},
    "mlp": {"router": "mlp"},
    "normed": {"router": "linear", "router_input_norm": True},
    "block": {"router": "linear", "router_scope": "block", "top_k": 2},
    "model": {"router": "linear", "router_scope": "model", "router_below_tap": "probe"},
    "whole networks": {"router": "linear", "router_scope": "block", "mixing": "block", "top_k": 2},
}


@pytest.fixture(params=KINDS)
def saved(request, zoo, tmp_path):
    model = zoo.mixture("llama", router_init_std=0.5, **KINDS[request.param])
    model.save_pretrained(tmp_path / "mixture")
    with torch.no_grad():
        return tmp_path / "mixture", model(input_ids=IDS).logits


def test_an_offloaded_mixture_computes_the_same(zoo, saved):
    folder, wanted = saved
    base = AutoModelForCausalLM.from_pretrained(zoo.saved_base("llama"))
    model = PeftModel.from_pretrained(base, folder).eval()
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, wanted)
    assert all(p.is_meta for p in model.parameters())  # nothing stays behind
    real = torch.ones_like(IDS)
    written = model.generate(input_ids=IDS, attention_mask=real, max_new_tokens=3, min_new_tokens=3)
    assert written.shape == (1, 8)


def on_disk(zoo, folder, tmp_path, monkeypatch):
    """Load a mixture as PEFT does it on a base of which all blocks but the first lie on disk."""
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    blocks = AutoModelForCausalLM.from_pretrained(zoo.saved_base("llama")).config.num_hidden_layers
    places |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(blocks)}
    base = AutoModelForCausalLM.from_pretrained(
        zoo.saved_base("llama"), device_map=places, offload_folder=tmp_path / "base"
    )
    there = {f"base_model.model.{name}": place for name, place in places.items()}
    there["base_model.model.shared_router"] = "cpu"
    monkeypatch.chdir(tmp_path)  # where PEFT puts what it renames
    return PeftModel.from_pretrained(base, folder, device_map=there, offload_folder=tmp_path / "mixture")


@pytest.mark.parametrize("saved", ["model"], indirect=True)
def test_experts_may_lie_on_disk(zoo, saved, tmp_path, monkeypatch):
    folder, wanted = saved
    model = on_disk(zoo, folder, tmp_path, monkeypatch).eval()
    layers = [m for m in model.modules() if isinstance(m, MoLoraLayer)]
    assert any(layer.molora_A["default"].weight.is_meta for layer in layers)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, wanted)


@pytest.mark.parametrize("saved", ["linear", "block"], indirect=True)
def test_routers_that_peft_loses_on_disk_are_missed_at_once(zoo, saved, tmp_path, monkeypatch):
    with pytest.raises(PeftMoeError, match=r"scorer\.weight was offloaded to disk.*device_map"):
        on_disk(zoo, saved[0], tmp_path, monkeypatch)


def test_what_is_refused_on_disk_is_taken_out_again(zoo, tmp_path, monkeypatch):
    zoo.mixture("llama", router="linear", top_k=2, router_init_std=0.5).save_pretrained(tmp_path / "mixture")
    taken: list[torch.nn.Module] = []
    real = AutoModelForCausalLM.from_pretrained

    def keep(*args, **kwargs):
        taken.append(real(*args, **kwargs))
        return taken[-1]

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", keep)
    with pytest.raises(PeftMoeError, match="offloaded to disk"):
        on_disk(zoo, tmp_path / "mixture", tmp_path, monkeypatch)
    assert not any(isinstance(module, MoLoraLayer) for module in taken[-1].modules())
