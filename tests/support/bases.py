"""Tiny bases of several architectures, made from configs: no network, milliseconds each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BertConfig,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlavaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
    SwitchTransformersConfig,
    T5Config,
    ViTConfig,
)

VOCAB = 48
# A multiple of 64, the block of 4-bit quantisation; unlike the other sizes, so that no transposition hides.
HIDDEN = 64
LAYERS = 3
PAD = 0
IMAGE = 16
IMAGE_TOKEN = 47

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
        kind: "causal", "encoder" or "seq2seq"; "classifier" gives one answer for a whole sequence.
        attention, mlp: names of its linear layers; the first of each is called first.
        layer: pattern of a layer's index in a module's name.
        task_type: PEFT's word for it.
        router_seed: of router weights that choose different experts for the two standard prompts.
        auto: class that makes it from its configuration, where the kind does not say.
        reads: "text", "pixels" or "both".
    """

    config: Callable[[], PreTrainedConfig]
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    kind: str = "causal"
    layer: str = r"\.layers\.(\d+)\."
    task_type: str | None = "CAUSAL_LM"
    router_seed: int = 0
    auto: type | None = None
    reads: str = "text"

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

# Further bases, each for what only it has; tests/conformance/test_architectures.py has their table.
_NO_GQA = {key: value for key, value in _DECODER.items() if key != "num_key_value_heads"}
_ENCODER = {
    **_SPECIAL,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}
_VISION = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "image_size": IMAGE,
}
_BERT = {
    "attention": ("query", "key", "value"),
    "mlp": ("intermediate.dense", "output.dense"),
    "layer": r"\.layer\.(\d+)\.",
    "task_type": None,
}

MORE: dict[str, Architecture] = {
    # A window on all layers.
    "mistral": Architecture(lambda: MistralConfig(**_DECODER, sliding_window=8), **_LLAMA),
    # Biases on q, k and v; tied weights.
    "qwen2": Architecture(lambda: Qwen2Config(**{**_DECODER, "tie_word_embeddings": True}), **_LLAMA),
    # Soft-capped logits, norms around each block.
    "gemma2": Architecture(lambda: Gemma2Config(**_DECODER, head_dim=16, sliding_window=8), **_LLAMA),
    # Fused q, k and v; fused gate and up.
    "phi3": Architecture(
        lambda: Phi3Config(**_DECODER),
        attention=("qkv_proj", "o_proj"),
        mlp=("gate_up_proj", "down_proj"),
    ),
    # Fused and interleaved q, k and v, with biases; attention and MLP side by side.
    "gpt_neox": Architecture(
        lambda: GPTNeoXConfig(**_NO_GQA),
        attention=("query_key_value", "attention.dense"),
        mlp=("dense_h_to_4h", "dense_4h_to_h"),
    ),
    # Its MLP may see tokens without a batch dimension.
    "opt": Architecture(
        lambda: OPTConfig(
            **_SPECIAL, hidden_size=HIDDEN, ffn_dim=128, num_hidden_layers=LAYERS, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=HIDDEN, dropout=0.0,
        ),
        attention=("q_proj", "k_proj", "v_proj", "out_proj"),
        mlp=("fc1", "fc2"),
    ),
    # One key for all heads, a Linear class of its own.
    "falcon": Architecture(
        lambda: FalconConfig(
            **_SPECIAL, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4, multi_query=True,
        ),
        attention=("query_key_value", "self_attention.dense"),
        mlp=("dense_h_to_4h", "dense_4h_to_h"),
        layer=r"\.h\.(\d+)\.",
    ),
    # Its experts are one 3-D parameter, as Mixtral's; the first layer is dense.
    "qwen3_moe": Architecture(
        lambda: Qwen3MoeConfig(
            **_DECODER, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
            mlp_only_layers=[0],
        ),
        attention=("q_proj", "k_proj", "v_proj", "o_proj"),
        mlp=(),
    ),
    # No attention, and a cache of states instead of keys.
    "mamba": Architecture(
        lambda: MambaConfig(**_SPECIAL, hidden_size=HIDDEN, num_hidden_layers=LAYERS, state_size=8),
        attention=("in_proj",),
        mlp=("x_proj",),
    ),
    "bart": Architecture(
        lambda: BartConfig(
            vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=1, eos_token_id=2, decoder_start_token_id=PAD,
            d_model=HIDDEN, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=64,
            dropout=0.0, forced_eos_token_id=None,
        ),
        attention=("q_proj", "k_proj", "v_proj", "out_proj"),
        mlp=("fc1", "fc2"),
        kind="seq2seq",
        task_type="SEQ_2_SEQ_LM",
    ),
    # Its experts are modules of linear layers, which see loose tokens, as many as were sent there.
    "switch": Architecture(
        lambda: SwitchTransformersConfig(
            vocab_size=VOCAB, pad_token_id=PAD, eos_token_id=2, decoder_start_token_id=PAD, d_model=HIDDEN,
            d_kv=8, d_ff=96, num_layers=2, num_sparse_encoder_layers=1, num_decoder_layers=2,
            num_sparse_decoder_layers=1, num_heads=4, num_experts=3, dropout_rate=0.0,
            router_jitter_noise=0.0,
        ),
        attention=("q", "k", "v", "o"),
        mlp=("wi", "wo"),
        kind="seq2seq",
        layer=r"\.block\.(\d+)\.",
        task_type="SEQ_2_SEQ_LM",
    ),
    "bert_classifier": Architecture(
        lambda: BertConfig(**_ENCODER), **_BERT, kind="classifier", auto=AutoModelForSequenceClassification
    ),
    "roberta_classifier": Architecture(
        lambda: RobertaConfig(**_ENCODER), **_BERT, kind="classifier", auto=AutoModelForSequenceClassification
    ),
    "roberta_tokens": Architecture(lambda: RobertaConfig(**_ENCODER), **_BERT, kind="encoder"),
    # No tokens, no mask.
    "vit": Architecture(
        lambda: ViTConfig(**_VISION, patch_size=4, num_labels=3),
        attention=("q_proj", "k_proj", "v_proj", "o_proj"),
        mlp=("fc1", "fc2"),
        kind="classifier",
        task_type=None,
        auto=AutoModelForImageClassification,
        reads="pixels",
    ),
    # No logits: its hidden states are what others read.
    "clip_text": Architecture(
        lambda: CLIPTextConfig(
            **_SPECIAL, hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=LAYERS,
            num_attention_heads=4, max_position_embeddings=64, projection_dim=32,
        ),
        attention=("q_proj", "k_proj", "v_proj", "out_proj"),
        mlp=("fc1", "fc2"),
        kind="encoder",
        task_type=None,
        auto=CLIPTextModel,
    ),
    # Two towers, with layers of the same names: experts sit in both.
    "llava": Architecture(
        lambda: LlavaConfig(
            vision_config=CLIPVisionConfig(**_VISION, patch_size=8, projection_dim=32),
            text_config=LlamaConfig(**_DECODER),
            image_token_id=IMAGE_TOKEN, image_seq_length=4, vision_feature_select_strategy="default",
            vision_feature_layer=-1,
        ),
        attention=("q_proj", "k_proj", "v_proj", "o_proj"),
        mlp=("up_proj", "fc1", "down_proj"),
        auto=AutoModelForImageTextToText,
        reads="both",
    ),
}  # fmt: skip

BASES = {**ARCHITECTURES, **MORE}

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
    arch = BASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        auto, config = arch.auto or _AUTO[arch.kind], arch.config()
        model = auto.from_config(config) if hasattr(auto, "from_config") else auto(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.15)
    return model.eval()
