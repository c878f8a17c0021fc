"""Train one plain LoRA expert with TRL's SFTTrainer: the kind of adapter that peft-moe mixes.

    python recipes/train_expert.py --config recipes/configs/text_expert.yaml \\
        --model_name_or_path runs/text/base --dataset_name math.jsonl --output_dir runs/math
    python recipes/train_expert.py --config recipes/configs/text_expert.yaml \\
        --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name trl-lib/Capybara

`dataset_name` is a .jsonl/.json file, a directory saved by `datasets`, or a name on the Hub, with
columns prompt + completion (the loss is on the completion), messages, or text. Keys are TRL's:
those of SFTConfig and ModelConfig (`lora_r`, `lora_alpha`, `lora_target_modules`, `use_rslora`,
`load_in_4bit`, ...). Give experts that you will mix different seeds: with one seed their `lora_A`
start equal. `save_strategy: steps` and `resume_from_checkpoint: last` survive a crash.

Memory: about 2 GB for the 5-million-parameter base of text_base.yaml.
"""

import json
import os
import time
from dataclasses import dataclass, field

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import (
    ModelConfig,
    SFTConfig,
    SFTTrainer,
    get_peft_config,
    get_quantization_config,
)

from peft_moe.io.text_data import load_text_dataset, text_kind
from peft_moe.training import StrictTrlParser


@dataclass
class DataArguments:
    """What to train on and what to hold out. `$VARIABLES` in file names are expanded."""

    dataset_name: str = field(metadata={"help": "A .jsonl file, a saved directory, or a Hub name."})
    dataset_config: str | None = field(default=None, metadata={"help": "Of a Hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Of a Hub dataset."})
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Held-out data; by default `eval_fraction` is split off."}
    )
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Held-out split of a Hub dataset, instead of the above."}
    )
    eval_fraction: float = field(default=0.05, metadata={"help": "Split off where none is named."})
    max_eval_records: int = field(default=200, metadata={"help": "Held-out records to score."})


def load_data(args: DataArguments, seed: int) -> tuple[Dataset, Dataset]:
    """The training records and the held-out records."""
    name, config = os.path.expandvars(args.dataset_name), args.dataset_config
    train = load_text_dataset(name, args.dataset_train_split, config=config)
    if args.eval_dataset_name:
        heldout = load_text_dataset(os.path.expandvars(args.eval_dataset_name))
    elif args.dataset_test_split:
        heldout = load_text_dataset(name, args.dataset_test_split, config=config)
    else:
        if len(train) < 2:
            raise ValueError(f"{name} has {len(train)} record; name an `eval_dataset_name`.")
        count = max(1, int(len(train) * args.eval_fraction))
        halves = train.train_test_split(test_size=count, seed=seed)
        train, heldout = halves["train"], halves["test"]
    heldout = heldout.shuffle(seed=seed)
    return train, heldout.select(range(min(len(heldout), args.max_eval_records)))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, data: Dataset) -> None:
    """Name the two causes that would otherwise end in a bare error deep inside the trainer."""
    kind = text_kind(data.column_names)
    lists = kind == "prompt_completion" and not isinstance(data[0]["prompt"], str)
    if (kind == "messages" or lists) and tokenizer.chat_template is None:
        raise ValueError(
            "The data are chat messages, but this tokenizer has no chat template. Name one with "
            "`chat_template_path`, take the base's -Instruct tokenizer, or use prompt + completion."
        )
    if tokenizer.eos_token is None:
        raise ValueError("The tokenizer has no end-of-text token. Name one with `eos_token`.")


if __name__ == "__main__":
    parser = StrictTrlParser((DataArguments, SFTConfig, ModelConfig))
    data_args, args, model_args = parser.parse_args_and_config()
    wall, cpu = time.time(), time.process_time()
    train, heldout = load_data(data_args, args.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    if args.eos_token is not None:
        tokenizer.eos_token = args.eos_token
    if args.chat_template_path is None:
        check_tokenizer(tokenizer, train)

    model_args.use_peft = True  # TRL builds a LoraConfig only then
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (args.model_init_kwargs or {})
    set_seed(args.seed)  # before the adapter is made: the seed decides its `lora_A`
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=args,
        train_dataset=train,
        eval_dataset=heldout,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    kept = len(trainer.train_dataset)
    if kept == 0:
        raise ValueError(
            f"No record is left: every prompt alone reaches max_length={args.max_length}. Raise it."
        )
    if not args.packing and kept < len(train):
        print(f"{len(train) - kept} of {len(train)} records left out (prompt over max_length).")

    before = trainer.evaluate()["eval_loss"]  # lora_B is zero still: this is the base
    resume: str | None = args.resume_from_checkpoint
    if resume in ("last", "true", "True"):
        resume = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
    trainer.train(resume_from_checkpoint=resume)
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(args.output_dir)
    summary = {
        "heldout_loss_base": round(before, 4),
        "heldout_loss": round(after, 4),
        "steps": trainer.state.global_step,
        "records": kept,
        "wall_s": round(time.time() - wall),
        "cpu_s": round(time.process_time() - cpu),
    }
    with open(os.path.join(args.output_dir, "summary.json"), "w") as file:
        json.dump(summary, file)
    print(f"Held-out loss: base {before:.4f}, expert {after:.4f}. Saved {args.output_dir}: {summary}")
