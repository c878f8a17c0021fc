"""Train a small Llama-style causal language model from scratch, tokenizer included.

    export PEFT_MOE_DATA=../shared/data          # <domain>/{train,valid}.jsonl
    python recipes/train_base.py --config recipes/configs/text_base.yaml
    python recipes/train_base.py --config recipes/configs/text_base.yaml --max_steps 20   # a look

A base for experiments on a laptop: large enough that LoRA experts of different domains differ,
small enough to train in half an hour on one CPU core. The text (prompt + completion, or `text`)
is joined with end-of-text tokens between records and cut into blocks of `block_size` tokens, so no
token is padding. Every key of `transformers.TrainingArguments` works in the YAML and on the command
line; `resume_from_checkpoint: last` goes on where a run stopped.

Memory: about 2 GB for the 5-million-parameter model of text_base.yaml.
"""

import json
import os
import time
from dataclasses import dataclass, field

from datasets import Dataset, concatenate_datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from peft_moe.io.text_data import load_text_dataset, text_kind
from peft_moe.training import StrictTrlParser

EOS, PAD = "<|endoftext|>", "<|pad|>"  # distinct, or the label of every end would be masked


@dataclass
class DataArguments:
    """What to read. `$VARIABLES` in file names are expanded."""

    train_files: list[str] = field(metadata={"help": "Sources used in full."})
    sampled_files: list[str] = field(default_factory=list, metadata={"help": "Used in part."})
    sample_fraction: float = field(default=0.25, metadata={"help": "The part of each of these."})
    eval_files: list[str] = field(default_factory=list, metadata={"help": "Held-out sources."})
    max_eval_blocks: int = field(default=400, metadata={"help": "Held-out blocks to score."})


@dataclass
class ArchitectureArguments:
    """The shape of the model; names as in `LlamaConfig`."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    block_size: int = field(default=256, metadata={"help": "Tokens per training block."})
    max_position_embeddings: int = 1024


def read_texts(files: list[str], fraction: float, seed: int) -> Dataset:
    """One column `text` from all files, or from a random `fraction` of each."""
    parts = []
    for file in files:
        data = load_text_dataset(os.path.expandvars(file))
        if fraction < 1:
            data = data.shuffle(seed=seed).select(range(max(1, int(len(data) * fraction))))
        if text_kind(data.column_names) == "prompt_completion":
            texts = [p + c for p, c in zip(data["prompt"], data["completion"], strict=True)]
        else:
            texts = list(data["text"])
        parts.append(Dataset.from_dict({"text": texts}))
    return concatenate_datasets(parts)


def train_tokenizer(texts: Dataset, vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: no unknown token in any language; digits stay single, for arithmetic."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[EOS, PAD], initial_alphabet=alphabet)
    bpe.train_from_iterator(texts["text"], trainer, length=len(texts))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=EOS, pad_token=PAD, model_max_length=max_length
    )


def cut_blocks(texts: Dataset, tokenizer: PreTrainedTokenizerFast, size: int) -> Dataset:
    """Join the records, an end-of-text token after each, and cut blocks of `size` tokens."""
    ids: list[int] = []
    for row in tokenizer(list(texts["text"]), verbose=False)["input_ids"]:
        ids += [*row, tokenizer.eos_token_id]
    blocks = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
    if not blocks:
        raise ValueError(f"{len(ids)} tokens do not fill one block of block_size={size}.")
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


if __name__ == "__main__":
    parser = StrictTrlParser((DataArguments, ArchitectureArguments, TrainingArguments))
    data_args, shape, args = parser.parse_args_and_config()
    set_seed(args.seed)
    wall, cpu = time.time(), time.process_time()

    texts = concatenate_datasets(
        [read_texts(data_args.train_files, 1.0, args.seed)]
        + [read_texts([f], data_args.sample_fraction, args.seed) for f in data_args.sampled_files]
    ).shuffle(seed=args.seed)
    tokenizer = train_tokenizer(texts, shape.vocab_size, shape.max_position_embeddings)
    train = cut_blocks(texts, tokenizer, shape.block_size)
    heldout = None
    if data_args.eval_files:
        held_texts = read_texts(data_args.eval_files, 1.0, args.seed).shuffle(seed=args.seed)
        heldout = cut_blocks(held_texts, tokenizer, shape.block_size)
        heldout = heldout.select(range(min(len(heldout), data_args.max_eval_blocks)))

    sizes = {k: v for k, v in vars(shape).items() if k not in ("block_size", "vocab_size")}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(
        **sizes, **ends, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    print(f"{model.num_parameters():,} parameters, {len(train) * shape.block_size:,} train tokens")

    trainer = Trainer(model, args, default_data_collator, train, heldout, tokenizer)
    resume: str | None = args.resume_from_checkpoint
    if resume in ("last", "true", "True"):
        resume = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
    trainer.train(resume_from_checkpoint=resume)
    summary = {"train_tokens": len(train) * shape.block_size, "steps": trainer.state.global_step}
    if heldout is not None:
        summary["heldout_loss"] = round(trainer.evaluate()["eval_loss"], 4)
    trainer.save_model(args.output_dir)
    summary |= {"wall_s": round(time.time() - wall), "cpu_s": round(time.process_time() - cpu)}
    with open(os.path.join(args.output_dir, "summary.json"), "w") as file:
        json.dump(summary, file)
    print(f"Saved {args.output_dir}: {summary}")
