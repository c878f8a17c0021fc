"""What is loaded is what was saved: damage of a saved mixture is refused by name when it arrives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from support.batches import batch_for, logits_of, texts
from support.versions import transformers_own_loading
from support.zoo import Zoo
from torch import Tensor

from peft_moe import PeftMoeError

BATCH = batch_for("llama", texts())
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Tensors = dict[str, Tensor]


def find(tensors: Tensors, part: str) -> str:
    return next(key for key in sorted(tensors) if part in key)


def flip(tensors: Tensors) -> None:
    """One bit of the last number of an expert: finite before and after."""
    tensors[find(tensors, "molora_B")].view(torch.int32)[-1, -1] ^= 1


def poison(part: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[find(tensors, part)].view(-1)[-1] = torch.nan

    return change


def add(tensors: Tensors) -> None:
    key = find(tensors, "molora_A")
    tensors[key.replace("layers.0", "layers.7")] = tensors[key].clone()


DAMAGES: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "a flipped bit": (flip, r"weights of expert '.*' are not those"),
    "NaN in an expert": (poison("molora_A"), r"molora_A .*holds NaN"),
    "NaN in a router": (poison("molora_router"), r"molora_router.* holds NaN"),
    "a lost router": (lambda t: t.pop(find(t, "molora_router")), r"molora_router.* is missing from the file"),
    "a lost expert tensor": (lambda t: t.pop(find(t, "molora_B")), r"molora_B is missing from the file"),
    "an extra tensor": (add, r"no place for, for example .*layers\.7"),
}


def damaged(zoo: Zoo, folder: Path, change: Callable[[Tensors], object], routing: str = "dense") -> str:
    zoo.mixture("llama", routing).save_pretrained(str(folder))
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_refused_while_loading(
    zoo: Zoo, case: str, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    change, words = DAMAGES[case]
    folder = damaged(zoo, tmp_path, change)
    with pytest.raises(PeftMoeError, match=words):
        PeftModel.from_pretrained(zoo.base("llama"), folder, low_cpu_mem_usage=low_cpu_mem_usage)


@pytest.mark.parametrize("routing", ["block", "token-probe"])
def test_a_lost_shared_router_is_refused(zoo: Zoo, routing: str, tmp_path: Path) -> None:
    folder = damaged(zoo, tmp_path, lambda t: t.pop(find(t, "molora_router")), routing)
    with pytest.raises(PeftMoeError, match=r"molora_router.* is missing"):
        PeftModel.from_pretrained(zoo.base("llama"), folder)


@transformers_own_loading
def test_transformers_own_loading_is_checked_before_the_first_pass(zoo: Zoo, tmp_path: Path) -> None:
    model = zoo.base("llama")
    model.load_adapter(damaged(zoo, tmp_path, flip))
    with pytest.raises(PeftMoeError, match="are not those that its config describes"):
        logits_of(model, BATCH)


def test_verify_experts_bites(zoo: Zoo, tmp_path: Path) -> None:
    config = PeftConfig.from_pretrained(damaged(zoo, tmp_path, flip))
    config.verify_experts = False
    model = PeftModel.from_pretrained(zoo.base("llama"), str(tmp_path), config=config)
    assert torch.isfinite(logits_of(model.eval(), BATCH)).all()


def test_another_mixture_under_the_same_name_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    """PEFT takes the new weights and keeps the old config; the digests of the old one tell."""
    one, other = tmp_path / "one", tmp_path / "other"
    zoo.mixture("llama", "dense").save_pretrained(str(one))
    shutil.copytree(one, other)
    tensors = load_file(other / WEIGHTS)
    tensors[find(tensors, "molora_A")] += 1
    save_file(tensors, other / WEIGHTS, metadata={"format": "pt"})
    model = PeftModel.from_pretrained(zoo.base("llama"), str(one))
    model.load_adapter(str(one), "default")  # the same again is no harm
    with pytest.raises(PeftMoeError, match="choose another adapter_name"):
        model.load_adapter(str(other), "default")


def test_old_files_without_digests_and_cast_ones_load(zoo: Zoo, tmp_path: Path) -> None:
    model = zoo.mixture("llama", "dense")
    model.save_pretrained(str(tmp_path / "new"))
    saved = json.loads((tmp_path / "new" / CONFIG).read_text())
    assert all(record.pop("digest").startswith("float32:") for record in saved["experts"])
    saved.pop("verify_experts")
    (tmp_path / "new" / CONFIG).write_text(json.dumps(saved))
    loaded = PeftModel.from_pretrained(zoo.base("llama"), str(tmp_path / "new")).eval()
    assert torch.equal(logits_of(loaded, BATCH), logits_of(model, BATCH))
    model.half().save_pretrained(str(tmp_path / "half"))
    PeftModel.from_pretrained(zoo.base("llama"), str(tmp_path / "half"))


def test_experts_that_train_have_no_digest(zoo: Zoo, tmp_path: Path) -> None:
    zoo.mixture("llama", "dense", train_experts=True).save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / CONFIG).read_text())
    assert not any("digest" in record for record in saved["experts"])
    PeftModel.from_pretrained(zoo.base("llama"), str(tmp_path), is_trainable=True)
