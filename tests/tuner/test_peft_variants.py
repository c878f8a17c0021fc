"""Where a mixture is loaded from, how it was written, and what PEFT offers beside: it works or is refused."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from support.batches import batch_for, labels_for, logits_of, texts
from support.routing import set_routers
from support.zoo import Zoo

from peft_moe import MoLoraConfig, PeftMoeError

BATCH = batch_for("llama", texts())


@pytest.mark.parametrize("routing", ["dense", "block", "prompt-probe"])
def test_from_a_subfolder(zoo: Zoo, routing: str, tmp_path: Path) -> None:
    model = zoo.mixture("llama", routing)
    model.save_pretrained(str(tmp_path / "mixtures" / "best"))
    loaded = PeftModel.from_pretrained(
        zoo.base("llama"), str(tmp_path / "mixtures"), subfolder="best", adapter_name="one"
    ).eval()
    assert torch.equal(logits_of(loaded, BATCH), logits_of(model, BATCH))
    loaded.load_adapter(str(tmp_path / "mixtures"), adapter_name="two", subfolder="best")
    loaded.set_adapter("two")
    assert torch.equal(logits_of(loaded, BATCH), logits_of(model, BATCH))


def test_from_a_revision(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's cache, in its own layout; nothing else of the Hub can be had offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    models = {}
    repository = tmp_path / "models--org--mixture"
    (repository / "refs").mkdir(parents=True)
    for seed, revision in enumerate(("main", "v1")):
        models[revision] = zoo.mixture("llama", "dense", seed=seed)
        commit = str(seed) * 40
        models[revision].save_pretrained(str(repository / "snapshots" / commit))
        (repository / "refs" / revision).write_text(commit)
    for revision, model in models.items():
        loaded = PeftModel.from_pretrained(
            zoo.base("llama"), "org/mixture", revision=revision, cache_dir=str(tmp_path)
        ).eval()
        assert torch.equal(logits_of(loaded, BATCH), logits_of(model, BATCH))
    assert not torch.equal(logits_of(models["main"], BATCH), logits_of(models["v1"], BATCH))


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("routing", ["dense", "prompt-base"])
def test_both_of_pefts_file_formats(zoo: Zoo, routing: str, safe: bool, tmp_path: Path) -> None:
    model = zoo.mixture("llama", routing)
    model.save_pretrained(str(tmp_path), safe_serialization=safe)
    name = f"adapter_model.{'safetensors' if safe else 'bin'}"
    assert [p.name for p in tmp_path.glob("adapter_model.*")] == [name]
    loaded = PeftModel.from_pretrained(zoo.base("llama"), str(tmp_path)).eval()
    assert torch.equal(logits_of(loaded, BATCH), logits_of(model, BATCH))


def test_hotswap_is_refused_by_name(zoo: Zoo, tmp_path: Path) -> None:
    """PEFT swaps LoRA alone; a mixture loads a second adapter and switches."""
    zoo.mixture("llama", "dense", seed=1).save_pretrained(str(tmp_path))
    model = zoo.mixture("llama", "dense")
    before = logits_of(model, BATCH)
    with pytest.raises(ValueError, match=r"Hotswapping only supports .*MOLORA was passed"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device="cpu")
    assert torch.equal(logits_of(model, BATCH), before)


@pytest.mark.parametrize("bias", ["all", "molora_only"])
def test_biases_train_with_the_mixture(zoo: Zoo, bias: str, tmp_path: Path) -> None:
    model = zoo.mixture("gpt2", "dense", bias=bias)
    batch = batch_for("gpt2", texts())
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "molora_" not in n}
    inside = {n for n in trained if ".base_layer.bias" in n}
    assert inside
    assert (trained == inside) == (bias == "molora_only")
    assert all(n.endswith(".bias") for n in trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(**batch, labels=labels_for("gpt2", batch)).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(zoo.base("gpt2"), str(tmp_path)).eval()
    assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))
    # A trained bias stays when the mixture is switched off, and PEFT says so.
    with (
        pytest.warns(UserWarning, match="does not produce the same output as the base"),
        model.disable_adapter(),
    ):
        assert not torch.equal(logits_of(model, batch), logits_of(zoo.base("gpt2"), batch))
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("other", MoLoraConfig(experts=zoo.experts("gpt2"), bias=bias))
    assert list(model.peft_config) == ["default"]


def test_no_bias_no_warning(zoo: Zoo) -> None:
    model = zoo.mixture("llama", "dense")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.disable_adapter():
            assert torch.equal(logits_of(model, BATCH), logits_of(zoo.base("llama"), BATCH))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_fresh_experts_follow_the_base_where_autocasting_is_declined(zoo: Zoo, dtype: torch.dtype) -> None:
    """Routers stay float32 all the same; given experts keep the dtype that they came in."""
    for fields, expected in (
        ({"experts": 3, "init_weights": False}, dtype),
        ({"experts": zoo.experts("llama")}, torch.float32),
    ):
        config = MoLoraConfig(target_modules=["q_proj"], **fields)
        model = get_peft_model(zoo.base("llama").to(dtype), config, autocast_adapter_dtype=False)
        dtypes = {n.split("molora_")[1][0]: p.dtype for n, p in model.named_parameters() if "molora_" in n}
        assert dtypes == {"A": expected, "B": expected, "r": torch.float32}
        assert torch.isfinite(logits_of(model.eval(), BATCH)).all()


def test_fresh_experts_that_nobody_filled_say_so(zoo: Zoo) -> None:
    """PEFT's ``low_cpu_mem_usage`` of a direct injection leaves the weights to a loader."""
    from peft import inject_adapter_in_model

    config = MoLoraConfig(experts=2, target_modules=["q_proj"])
    model = inject_adapter_in_model(config, zoo.base("llama"), low_cpu_mem_usage=True)
    with pytest.raises(PeftMoeError, match="never loaded"):
        model(**BATCH)


def test_one_config_object_through_a_load(zoo: Zoo, tmp_path: Path) -> None:
    config = MoLoraConfig(experts=2, target_modules=["q_proj"], init_weights=False)
    model = get_peft_model(zoo.base("llama"), config).eval()
    assert config.experts == 2  # whoever makes experts gets a copy
    set_routers(model)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(zoo.base("llama"), str(tmp_path), config=config).eval()
    assert loaded.peft_config["default"] is config
    assert torch.equal(logits_of(loaded, BATCH), logits_of(model, BATCH))
