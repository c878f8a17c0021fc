"""Mixtures of every format that was ever written are read by this version, and compute what they did."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from peft_moe import load_mixture
from peft_moe.tuner.config.fields import FORMAT_VERSION

GOLDEN = Path(__file__).parents[1] / "golden"
FORMATS = range(1, FORMAT_VERSION + 1)


def test_every_format_is_kept() -> None:
    assert {path.name for path in GOLDEN.glob("format-*")} == {f"format-{number}" for number in FORMATS}


@pytest.mark.parametrize("loader", [load_mixture, PeftModel.from_pretrained])
@pytest.mark.parametrize("number", FORMATS)
def test_it_loads_and_computes_what_it_did(number: int, loader: object, tmp_path: Path) -> None:
    place = GOLDEN / f"format-{number}"
    base = LlamaForCausalLM.from_pretrained(place / "base").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=UserWarning)
        model = loader(base, str(place / "mixture")).eval()
    known = json.loads((place / "logits.json").read_text())
    with torch.no_grad():
        logits = model(torch.tensor(known["ids"])).logits
    # Another processor may add up in another order.
    torch.testing.assert_close(logits, torch.tensor(known["logits"]), atol=1e-5, rtol=1e-5)
    with torch.no_grad(), model.disable_adapter():
        assert (model(torch.tensor(known["ids"])).logits - logits).abs().max() > 0.1
    model.save_pretrained(str(tmp_path))
    old, new = (load_file(p / "adapter_model.safetensors") for p in (place / "mixture", tmp_path))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
