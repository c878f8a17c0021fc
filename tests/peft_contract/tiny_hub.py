"""Tiny random models under the ids that PEFT's tests ask for, in the layout of the Hub's cache.

``python tiny_hub.py FOLDER`` makes them; with ``HF_HUB_CACHE=FOLDER`` and ``HF_HUB_OFFLINE=1`` transformers
finds them as if they had been downloaded.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    DebertaConfig,
    DebertaV2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    RobertaConfig,
    T5Config,
)

REVISION = "0" * 40
_TOKENS = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
_LLAMA = {
    **_TOKENS,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GPT = {**_TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_BERT = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_RELATIVE = {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]}

Build = tuple[type, Callable[[], PreTrainedConfig]]
MODELS: dict[str, Build] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        AutoModelForCausalLM,
        lambda: OPTConfig(
            **_TOKENS, hidden_size=16, ffn_dim=4, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=16,
        ),
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (AutoModelForCausalLM, lambda: GPT2Config(**_GPT)),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        AutoModelForCausalLM,
        lambda: GPTJConfig(**_GPT, rotary_dim=4),
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (
        AutoModelForCausalLM,
        lambda: LlamaConfig(**_LLAMA),
    ),
    "peft-internal-testing/tiny-dummy-qwen2": (AutoModelForCausalLM, lambda: Qwen2Config(**_LLAMA)),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        AutoModelForCausalLM,
        lambda: Gemma3TextConfig(**_LLAMA, head_dim=4, sliding_window=8),
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        AutoModelForSeq2SeqLM,
        lambda: T5Config(
            vocab_size=128, pad_token_id=0, eos_token_id=3, decoder_start_token_id=0, d_model=32, d_kv=8,
            d_ff=37, num_layers=2, num_heads=4,
        ),
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        AutoModelForSeq2SeqLM,
        lambda: BartConfig(
            **_TOKENS, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=4, decoder_ffn_dim=4, max_position_embeddings=64,
            decoder_start_token_id=3, forced_eos_token_id=None,
        ),
    ),
    "peft-internal-testing/tiny-random-BertModel": (AutoModel, lambda: BertConfig(**_BERT)),
    "peft-internal-testing/tiny-random-RobertaModel": (AutoModel, lambda: RobertaConfig(**_BERT)),
    "peft-internal-testing/tiny-random-DebertaModel": (
        AutoModel,
        lambda: DebertaConfig(**_BERT, **_RELATIVE),
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": (
        AutoModel,
        lambda: DebertaV2Config(**_BERT, **_RELATIVE),
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        AutoModelForSequenceClassification,
        lambda: BertConfig(**_BERT),
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        AutoModelForSequenceClassification,
        lambda: RobertaConfig(**_BERT),
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        AutoModelForSequenceClassification,
        lambda: LlamaConfig(**_LLAMA),
    ),
    # Of single tests that name well-known models.
    "bert-base-uncased": (AutoModelForSequenceClassification, lambda: BertConfig(**_BERT)),
}  # fmt: skip


def make_model(identifier: str) -> nn.Module:
    """One of the models; its numbers depend on nothing but its id.

    Weights are larger than a new model's, so that adapters of it differ visibly.
    """
    auto, config = MODELS[identifier]
    torch.manual_seed(int(hashlib.sha256(identifier.encode()).hexdigest()[:8], 16))
    model: nn.Module = auto.from_config(config())  # type: ignore[attr-defined]
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def make_hub(folder: Path) -> Path:
    """Make the cache, unless it is there; it appears whole or not at all."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    for identifier in MODELS:
        repository = scratch / f"models--{identifier.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(REVISION)
        make_model(identifier).save_pretrained(repository / "snapshots" / REVISION)
    try:
        os.rename(scratch, folder)
    except OSError:  # another process was faster
        assert folder.exists()
    return folder


if __name__ == "__main__":
    print(make_hub(Path(sys.argv[1])))
