"""Save the mixture of a format that later versions must load: ``python tests/golden/make_mixture.py FOLDER``.

Run once for each format, by the version that brings it; what it wrote is never written again.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_moe import MoLoraConfig

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "tie_word_embeddings": True,
}
IDS = [[1, 5, 9, 13, 17, 21], [3, 2, 31, 30, 7, 8]]
ADAPTERS = {
    "wide": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]},
    "narrow": {"r": 2, "lora_alpha": 1, "target_modules": ["q_proj"], "use_rslora": True},
}


def drawn(model: torch.nn.Module, part: str) -> None:
    """Numbers that matter in all parameters of a name."""
    for name, parameter in model.named_parameters():
        if part in name:
            torch.nn.init.normal_(parameter, std=0.3)


def main() -> None:
    place = Path(sys.argv[1])
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    drawn(base, "weight")
    base.save_pretrained(place / "base")
    with tempfile.TemporaryDirectory() as adapters:
        for name, lora in ADAPTERS.items():
            adapter = get_peft_model(base, LoraConfig(**lora))
            drawn(adapter, "lora_")
            adapter.save_pretrained(f"{adapters}/{name}")
            adapter.unload()
        experts = {name: f"{adapters}/{name}" for name in ADAPTERS}
        config = MoLoraConfig(experts=experts, router="linear", top_k=2, null_expert=True, mixing="block")
        model = get_peft_model(base, config).eval()
        for record in model.peft_config["default"].records():
            record["source"] = f"adapters/{record['name']}"
    drawn(model, "molora_router")
    model.save_pretrained(str(place / "mixture"))
    (place / "mixture" / "README.md").unlink()
    with torch.no_grad():
        logits = model(torch.tensor(IDS)).logits
    (place / "logits.json").write_text(json.dumps({"ids": IDS, "logits": logits.tolist()}) + "\n")


if __name__ == "__main__":
    main()
