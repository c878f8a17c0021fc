"""A mixture lives as every PEFT adapter does: saved, loaded, switched, copied, merged by PEFT's own calls."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from support.adapters import Recipe, make_adapter
from support.bases import make_base
from support.batches import batch_for, labels_for, logits_of, texts
from support.routing import ROUTINGS, choose, routers, set_routers
from support.versions import transformers_own_loading
from support.zoo import Zoo
from transformers import AutoModelForCausalLM

from peft_moe import MoLoraConfig, PeftMoeError
from peft_moe.tuner.layers.linear import MoLoraLayer

BATCH = batch_for("llama", texts())
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# One per place that a router may have.
PLACES = ["dense", "block", "token-probe", "prompt-base"]


def adapted(model: torch.nn.Module, adapter: str = "default") -> list[str]:
    return [m.name for m in model.modules() if isinstance(m, MoLoraLayer) and adapter in m.molora_A]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("routing", [*PLACES, "uniform"])
def test_from_pretrained(zoo: Zoo, routing: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = zoo.mixture("llama", routing)
    model.save_pretrained(str(tmp_path))
    assert {f.name for f in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    loaded = PeftModel.from_pretrained(
        zoo.base("llama"), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert not [n for n, p in loaded.named_parameters() if p.device.type == "meta"]
    assert torch.equal(logits_of(loaded, BATCH), logits_of(model, BATCH))
    assert not [n for n, p in loaded.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("routing", PLACES)
def test_a_bf16_base_rounds_neither_experts_nor_routers(
    zoo: Zoo, routing: str, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    model = zoo.mixture("llama", routing, base=zoo.base("llama").bfloat16())
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(
        zoo.base("llama").bfloat16(), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage
    )
    for candidate in (model, loaded):
        assert {p.dtype for n, p in candidate.named_parameters() if "molora" in n} == {torch.float32}
    assert torch.equal(logits_of(loaded.eval(), BATCH), logits_of(model, BATCH))


@pytest.mark.parametrize("routing", PLACES)
def test_from_pretrained_by_the_auto_class(zoo: Zoo, routing: str, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(zoo.saved_base("llama"))
    model = zoo.mixture("llama", routing, base=base)
    model.save_pretrained(str(tmp_path))
    loaded = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path)).eval()
    assert torch.equal(logits_of(loaded, BATCH), logits_of(model, BATCH))


@transformers_own_loading
@pytest.mark.parametrize("way", ["load_adapter", "auto"])
@pytest.mark.parametrize("routing", PLACES)
def test_transformers_own_loading(zoo: Zoo, routing: str, way: str, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(zoo.saved_base("llama"))
    bare = logits_of(base, BATCH)
    model = zoo.mixture("llama", routing, base=base)
    model.save_pretrained(str(tmp_path))
    if way == "auto":
        loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path))
    else:
        loaded = AutoModelForCausalLM.from_pretrained(zoo.saved_base("llama"))
        loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits_of(loaded.eval(), BATCH), logits_of(model, BATCH))
    loaded.disable_adapters()
    assert torch.equal(logits_of(loaded, BATCH), bare)
    loaded.enable_adapters()
    assert torch.equal(logits_of(loaded, BATCH), logits_of(model, BATCH))
    loaded.delete_adapter("default")
    assert torch.equal(logits_of(loaded, BATCH), bare)


@transformers_own_loading
def test_transformers_own_loading_of_bf16_experts_keeps_their_dtype(zoo: Zoo, tmp_path: Path) -> None:
    from support.adapters import RECIPES

    folder = zoo.adapter("llama", "wide-bf16", RECIPES["wide"], torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(zoo.saved_base("llama"))
    model = zoo.mixture("llama", "dense", base=base, experts={"only": folder, **zoo.experts("llama")})
    model.save_pretrained(str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path)).eval()
    assert torch.equal(logits_of(loaded, BATCH), logits_of(model, BATCH))
    dtypes = {n: p.dtype for n, p in model.named_parameters() if "molora" in n}
    assert dtypes == {f"base_model.model.{n}": p.dtype for n, p in loaded.named_parameters() if "molora" in n}


@pytest.mark.parametrize(
    ("first", "second"), [("dense", "block"), ("prompt-base", "token-probe"), ("uniform", "dense")]
)
def test_two_mixtures_side_by_side(zoo: Zoo, first: str, second: str, tmp_path: Path) -> None:
    folders = zoo.experts("llama")
    alone = {}
    for name, routing in (("one", first), ("two", second)):
        mixture = zoo.mixture("llama", routing)
        alone[name] = logits_of(mixture, BATCH)
        mixture.save_pretrained(str(tmp_path / name))
    model = get_peft_model(
        zoo.base("llama"),
        MoLoraConfig(experts=folders, task_type="CAUSAL_LM", **ROUTINGS[first]),
        adapter_name="one",
    ).eval()
    set_routers(model, adapter="one")
    model.add_adapter("two", MoLoraConfig(experts=folders, task_type="CAUSAL_LM", **ROUTINGS[second]))
    set_routers(model, adapter="two")
    assert model.active_adapters == ["one"]
    assert torch.equal(logits_of(model, BATCH), alone["one"])
    model.set_adapter("two")
    assert torch.equal(logits_of(model, BATCH), alone["two"])
    model.load_adapter(str(tmp_path / "one"), adapter_name="three")
    assert torch.equal(logits_of(model, BATCH), alone["two"])
    model.set_adapter("three")
    assert torch.equal(logits_of(model, BATCH), alone["one"])
    model.delete_adapter("three")
    model.delete_adapter("two")
    model.set_adapter("one")
    assert torch.equal(logits_of(model, BATCH), alone["one"])
    assert {n for n, _ in model.named_parameters() if ".two" in n or ".three" in n} == set()
    # What is saved of one is what was saved when it was alone.
    model.save_pretrained(str(tmp_path / "again"), selected_adapters=["one"])
    again, before = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("again/one", "one"))
    assert again.keys() == before.keys()
    assert all(torch.equal(again[key], before[key]) for key in before)


@pytest.mark.parametrize("routing", [*PLACES, "uniform"])
def test_two_mixtures_active_at_once_add_up(zoo: Zoo, routing: str) -> None:
    """Each mixture adds to the base by itself; on one linear layer their sum is exact up to rounding."""
    config = MoLoraConfig(experts=zoo.experts("llama"), task_type="CAUSAL_LM", **ROUTINGS[routing])
    model = get_peft_model(zoo.base("llama"), config, adapter_name="one").eval()
    model.add_adapter("two", config)
    for adapter in ("one", "two"):
        set_routers(model, adapter=adapter)
    model.base_model.set_adapter(["one", "two"])
    both = logits_of(model, BATCH)
    model.set_adapter("one")
    one = logits_of(model, BATCH)
    assert (both - one).abs().max() > 0.01
    assert torch.isfinite(both).all()


@pytest.mark.parametrize("routing", [*PLACES, "uniform"])
def test_state_dict_round_trip(zoo: Zoo, routing: str) -> None:
    model = zoo.mixture("llama", routing, seed=1)
    state = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    assert not [k for k in state if "default" in k]
    other = zoo.mixture("llama", routing, seed=2)
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    assert torch.equal(logits_of(other, BATCH), logits_of(model, BATCH))


def test_reports_of_peft(zoo: Zoo, capsys: pytest.CaptureFixture[str]) -> None:
    model = zoo.mixture("llama", "block")
    trained = sum(p.numel() for _, r in routers(model) for p in r.parameters())
    model.print_trainable_parameters()
    assert f"trainable params: {trained:,} " in capsys.readouterr().out
    status = model.get_model_status()
    assert (status.peft_types, status.trainable_params) == ({"default": "MOLORA"}, trained)
    assert status.active_adapters == status.available_adapters == ["default"]
    assert status.enabled
    layers = [layer for layer in model.get_layer_status() if layer.available_adapters]
    # 21 linears, and a router in each of 3 layers' attention and feed-forward module.
    assert len(layers) == 21 + 6
    assert all(layer.enabled and layer.active_adapters == ["default"] for layer in layers)


def test_modules_to_save(zoo: Zoo, tmp_path: Path) -> None:
    model = zoo.mixture("llama", "dense", modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert head.requires_grad
    with torch.no_grad():
        head.mul_(1.5)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(zoo.base("llama"), str(tmp_path)).eval()
    assert torch.equal(logits_of(loaded, BATCH), logits_of(model, BATCH))


FRESH = {"experts": 3, "r": 2, "init_weights": False, "top_k": None}
TARGETS = {
    "list": ({"target_modules": ["q_proj", "up_proj"]}, ["q_proj", "up_proj"], [0, 1, 2]),
    "regex": ({"target_modules": r".*\.[02]\.self_attn\.(q|v)_proj"}, ["q_proj", "v_proj"], [0, 2]),
    "all-linear": ({"target_modules": "all-linear"}, LINEARS, [0, 1, 2]),
    "exclude": ({"target_modules": "all-linear", "exclude_modules": ["down_proj"]}, LINEARS[:-1], [0, 1, 2]),
    "layers": ({"target_modules": ["o_proj"], "layers_to_transform": [1]}, ["o_proj"], [1]),
    "default": ({}, ["q_proj", "v_proj"], [0, 1, 2]),
}


@pytest.mark.parametrize("case", TARGETS)
def test_target_modules(zoo: Zoo, case: str, tmp_path: Path) -> None:
    fields, names, layers = TARGETS[case]
    model = zoo.mixture("llama", "dense", **FRESH, **fields)
    found = {tuple(name.split(".")[i] for i in (-3, -1)) for name in adapted(model)}
    assert found == {(str(layer), name) for layer in layers for name in names}
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(zoo.base("llama"), str(tmp_path)).eval()
    assert torch.equal(logits_of(loaded, BATCH), logits_of(model, BATCH))


@pytest.mark.parametrize("fields", [FRESH, {}], ids=["fresh", "given"])
@pytest.mark.parametrize("routing", [*PLACES, "uniform"])
def test_low_cpu_mem_usage_of_a_new_mixture(zoo: Zoo, routing: str, fields: dict) -> None:
    given = {"experts": zoo.experts("llama"), "task_type": "CAUSAL_LM", **ROUTINGS[routing], **fields}
    torch.manual_seed(0)
    model = get_peft_model(zoo.base("llama"), MoLoraConfig(**given), low_cpu_mem_usage=True).eval()
    assert not [n for n, p in model.named_parameters() if p.device.type == "meta"]
    set_routers(model)
    torch.manual_seed(0)
    plain = get_peft_model(zoo.base("llama"), MoLoraConfig(**given)).eval()
    set_routers(plain)
    assert torch.equal(logits_of(model, BATCH), logits_of(plain, BATCH))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("routing", [*PLACES, "uniform", "prompt-probe"])
def test_copies_stand_alone(zoo: Zoo, routing: str, how: str) -> None:
    model = zoo.mixture("llama", routing)
    expected = logits_of(model, BATCH)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    set_routers(model, seed=7)
    assert torch.equal(logits_of(twin, BATCH), expected)
    assert routing == "uniform" or not torch.equal(logits_of(model, BATCH), expected)
    # The copy's hooks belong to the copy: it trains and generates without the original.
    del model
    loss = twin.train()(**BATCH, labels=labels_for("llama", BATCH)).loss
    if routing != "uniform":
        loss.backward()
    twin.eval().generate(BATCH["input_ids"], max_new_tokens=2)
    assert torch.equal(logits_of(twin, BATCH), expected)


def test_merging_constant_gates_and_back(zoo: Zoo) -> None:
    model = zoo.mixture("llama", "uniform")
    expected, weights = logits_of(model, BATCH), copy.deepcopy(model.base_model.model.state_dict())
    model.merge_adapter(safe_merge=True)
    # Merged in float32: the sum is rounded once more than in the unmerged pass.
    torch.testing.assert_close(logits_of(model, BATCH), expected, atol=1e-5, rtol=1e-5)
    merged = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert not torch.allclose(merged, weights["model.layers.0.self_attn.q_proj.base_layer.weight"], atol=1e-3)
    model.unmerge_adapter()
    # Adding and subtracting rounds at 2^-24 of weights of size 1.
    for key, value in model.base_model.model.state_dict().items():
        torch.testing.assert_close(value, weights[key], atol=1e-6, rtol=0)


@pytest.mark.parametrize("routing", ["dense", "random", "block", "token-base", "prompt-probe"])
def test_merging_gates_that_read_their_input_is_refused(zoo: Zoo, routing: str) -> None:
    model = zoo.mixture("llama", routing)
    expected = logits_of(model, BATCH)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(PeftMoeError, match=r"routes by its input.*router='uniform'"):
            merge()
    assert torch.equal(logits_of(model, BATCH), expected)


@pytest.mark.parametrize("routing", [*PLACES, "uniform", "prompt-probe"])
def test_unload_gives_the_base_back(zoo: Zoo, routing: str) -> None:
    model = zoo.mixture("llama", routing)
    logits_of(model, BATCH)
    bare = model.unload()
    original = zoo.base("llama")
    assert [n for n, _ in bare.named_modules()] == [n for n, _ in original.named_modules()]
    assert torch.equal(logits_of(bare, BATCH), logits_of(original, BATCH))
    assert not [n for n, m in bare.named_modules() if m._forward_pre_hooks or m._forward_hooks]
    # And it takes a new mixture.
    again = zoo.mixture("llama", routing, base=bare)
    assert torch.equal(logits_of(again, BATCH), logits_of(zoo.mixture("llama", routing), BATCH))


@pytest.mark.parametrize("routing", ["dense", "block", "token-probe"])
def test_fresh_experts_learn(zoo: Zoo, routing: str) -> None:
    torch.manual_seed(0)
    fields = {"experts": 4, "r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(zoo.base("llama"), MoLoraConfig(**fields, **ROUTINGS[routing]))
    assert torch.equal(
        logits_of(model.eval(), BATCH), logits_of(zoo.base("llama"), BATCH)
    )  # B starts at zero
    model.train()
    start = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split("molora_")[1][0] for n in start} == {"A", "B", "r"}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = model(**BATCH, labels=labels_for("llama", BATCH)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Nine tokens are learnt by heart.
    assert losses[-1] < 0.2 * losses[0]
    moved = [n for n, p in model.named_parameters() if n in start and not torch.equal(p, start[n])]
    assert set(moved) == set(start)


@pytest.mark.parametrize("adapter", ["0", "layers", "q_proj", "model", "self_attn", "a.b", ""])
def test_adapter_names_that_peft_could_not_save_are_refused(zoo: Zoo, adapter: str) -> None:
    base = zoo.base("llama")
    config = MoLoraConfig(experts=zoo.experts("llama"))
    with pytest.raises(PeftMoeError, match="choose another"):
        get_peft_model(base, config, adapter_name=adapter)
    # The base is untouched, and the config still names its folders.
    assert torch.equal(logits_of(base, BATCH), logits_of(zoo.base("llama"), BATCH))
    assert config.experts == zoo.experts("llama")


def test_one_config_for_two_models(zoo: Zoo) -> None:
    config = MoLoraConfig(experts=zoo.experts("llama"), task_type="CAUSAL_LM")
    before = copy.deepcopy(config)
    models = [get_peft_model(zoo.base("llama"), config).eval() for _ in range(2)]
    assert config.experts == before.experts
    assert config.target_modules == before.target_modules is None
    for model in models:
        set_routers(model)
    assert torch.equal(logits_of(models[0], BATCH), logits_of(models[1], BATCH))
    assert models[0].peft_config["default"] is not models[1].peft_config["default"]


def test_a_config_without_its_weights_says_so(zoo: Zoo, tmp_path: Path) -> None:
    zoo.mixture("llama", "dense").save_pretrained(str(tmp_path))
    config = PeftConfig.from_pretrained(str(tmp_path))
    model = get_peft_model(zoo.base("llama"), config)
    with pytest.raises(PeftMoeError, match=r"never loaded; load the folder with PeftModel\.from_pretrained"):
        logits_of(model, BATCH)


def test_the_saved_config_is_plain_and_stable(zoo: Zoo, tmp_path: Path) -> None:
    zoo.mixture("llama", "prompt-base").save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "MOLORA"
    assert [record["name"] for record in saved["experts"]] == list(zoo.experts("llama"))
    assert all(len(record["sha256"]) == 64 for record in saved["experts"])
    assert saved["target_modules"] == sorted(saved["target_modules"])
    assert PeftConfig.from_pretrained(str(tmp_path)).router_tap == 1


def test_64_experts_of_ranks_1_to_16_in_one_mixture(tmp_path: Path) -> None:
    """Each is reached by its own gate, and comes back from a saved folder."""
    experts = {}
    for number in range(64):
        recipe = Recipe("attention", number, {"r": 1 + number % 16, "lora_alpha": 8})
        experts[f"expert-{number}"] = make_adapter("llama", tmp_path / str(number), recipe)
    config = MoLoraConfig(experts=experts, router="linear", router_scope="model")
    model = get_peft_model(make_base("llama"), config).eval()
    ids = torch.arange(1, 9)[None]
    for number in (0, 37, 63):
        choose(model, number)
        alone = PeftModel.from_pretrained(make_base("llama"), experts[f"expert-{number}"]).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, alone(ids).logits, atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path / "mixture")
    loaded = PeftModel.from_pretrained(make_base("llama"), tmp_path / "mixture").eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
