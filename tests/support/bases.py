"""Tiny bases of several architectures, made from configs: no network, milliseconds each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3Config,
    T5Config,
)

VOCAB = 48
# A multiple of 64, the block of 4-bit quantisation; unlike the other sizes, so that no transposition hides.
HIDDEN = 64
LAYERS = 3
PAD = 0

_SPECIAL = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {
    **_SPECIAL,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Architecture:
    """One tiny base.

    Attributes:
        config: makes its configuration.
        kind: "causal", "encoder" or "seq2seq".
        attention, mlp: names of its linear layers; the first of each is called first.
        layer: pattern of a layer's index in a module's name.
        task_type: PEFT's word for it.
        router_seed: of router weights that choose different experts for the two standard prompts.
    """

    config: Callable[[], PreTrainedConfig]
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    kind: str = "causal"
    layer: str = r"\.layers\.(\d+)\."
    task_type: str | None = "CAUSAL_LM"
    router_seed: int = 0

    @property
    def linears(self) -> list[str]:
        return [*self.attention, *self.mlp]


_LLAMA = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(lambda: LlamaConfig(**_DECODER), **_LLAMA),
    "qwen3": Architecture(lambda: Qwen3Config(**_DECODER, head_dim=8), **_LLAMA),
    # Sliding and full attention side by side: its layers get a dict of masks.
    "gemma3": Architecture(
        lambda: Gemma3TextConfig(
            **_DECODER,
            head_dim=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        **_LLAMA,
        router_seed=5,
    ),
    "gpt2": Architecture(
        lambda: GPT2Config(
            **_SPECIAL, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=64,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        ),
        attention=("c_attn", "attn.c_proj"),
        mlp=("c_fc", "mlp.c_proj"),
        layer=r"\.h\.(\d+)\.",
        router_seed=2,
    ),
    # Its own experts are bare parameters, which PEFT does not adapt; its attention is linear.
    "mixtral": Architecture(
        lambda: MixtralConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2),
        attention=("q_proj", "k_proj", "v_proj", "o_proj"),
        mlp=(),
        router_seed=1,
    ),
    "bert": Architecture(
        lambda: BertConfig(
            **_SPECIAL, hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=LAYERS,
            num_attention_heads=4, max_position_embeddings=64, num_labels=3,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ),
        attention=("query", "key", "value"),
        mlp=("intermediate.dense", "output.dense"),
        kind="encoder",
        layer=r"\.layer\.(\d+)\.",
        # PEFT would train a classifier's head beside the adapter; as an expert only the LoRA is wanted.
        task_type=None,
    ),
    "t5": Architecture(
        lambda: T5Config(
            vocab_size=VOCAB, pad_token_id=PAD, eos_token_id=2, decoder_start_token_id=PAD,
            d_model=HIDDEN, d_kv=8, d_ff=96, num_layers=2, num_decoder_layers=2, num_heads=4,
            dropout_rate=0.0,
        ),
        attention=("q", "k", "v", "o"),
        mlp=("wi", "wo"),
        kind="seq2seq",
        layer=r"\.block\.(\d+)\.",
        task_type="SEQ_2_SEQ_LM",
    ),
}  # fmt: skip

CAUSAL = [name for name, arch in ARCHITECTURES.items() if arch.kind == "causal"]

_AUTO = {
    "causal": AutoModelForCausalLM,
    "encoder": AutoModelForTokenClassification,
    "seq2seq": AutoModelForSeq2SeqLM,
}


def make_base(name: str, seed: int = 0) -> nn.Module:
    """A fresh base in eval mode; equal seeds give equal weights.

    Weights are larger than a new model's, so that layers differ and attention is not flat.
    """
    arch = ARCHITECTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _AUTO[arch.kind].from_config(arch.config())
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.15)
    return model.eval()
