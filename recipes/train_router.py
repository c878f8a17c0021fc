"""Train only the router of a mixture of LoRA experts, with TRL's SFTTrainer.

    python recipes/train_router.py --config recipes/configs/demo_router.yaml
    python recipes/train_router.py --config recipes/configs/text_router.yaml --seed 1
    python recipes/train_router.py --config recipes/configs/demo_router.yaml --resume_from_checkpoint last

`experts` maps names to trained adapters; `train_files` maps a domain's name to a .jsonl file, a
directory saved by `datasets` or a name on the Hub, with columns prompt + completion, messages, or
text. A domain that has no expert is generic data: with a null expert the router learns to leave it to
the base. `fit: true` first solves the router from the prompts (seconds), training then refines it.
All other keys are those of SFTConfig, ModelConfig and MoLoraConfig. Trained: a few thousand numbers.

Memory: the base, the experts and one batch of activations; 1.5 GB for the configs here.
"""

import json
import os
import time
from dataclasses import dataclass, field, fields

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, SFTConfig, TrlParser, get_quantization_config

from peft import get_peft_model
from peft_moe import MoLoraConfig
from peft_moe.fitting import fit_router
from peft_moe.training import MoLoraSFTTrainer
from peft_moe.training.data import load_text_dataset


@dataclass
class RouterArguments:
    """What to mix and what to train on. `$VARIABLES` in file names are expanded."""

    experts: dict = field(metadata={"help": "Name of each expert and its adapter's folder or Hub id."})
    train_files: dict = field(metadata={"help": "Domain and its file; an expert's name is its domain."})
    mixture: dict = field(default_factory=dict, metadata={"help": "Fields of MoLoraConfig."})
    samples_per_domain: int = field(default=500, metadata={"help": "Taken at random from each file."})
    eval_fraction: float = field(default=0.1, metadata={"help": "Held out of those."})
    fit: bool = field(default=False, metadata={"help": "Solve the router before training it."})


def load_data(args: RouterArguments, seed: int) -> tuple[Dataset, Dataset]:
    """Training and held-out records, with a column `domain`, balanced over the domains."""
    parts = {}
    for domain, source in args.train_files.items():
        data = load_text_dataset({domain: os.path.expandvars(source)}).shuffle(seed=seed)
        parts[domain] = data.select(range(min(len(data), args.samples_per_domain)))
    names = {name for part in parts.values() for name in part.column_names}
    shared = [name for name in names if all(name in part.column_names for part in parts.values())]
    from datasets import concatenate_datasets

    data = concatenate_datasets([part.select_columns(sorted(shared)) for part in parts.values()])
    halves = data.train_test_split(test_size=args.eval_fraction, seed=seed)
    return halves["train"], halves["test"]


def mixture_config(args: RouterArguments) -> MoLoraConfig:
    """The adapter's config, with an error for keys that it does not have."""
    known = {f.name for f in fields(MoLoraConfig) if f.init}
    unknown = sorted(set(args.mixture) - known)
    if unknown:
        raise ValueError(f"mixture: unknown keys {unknown}; MoLoraConfig has {sorted(known)}")
    experts = {name: os.path.expandvars(path) for name, path in args.experts.items()}
    return MoLoraConfig(experts=experts, task_type="CAUSAL_LM", **args.mixture)


def main() -> None:
    """Read the arguments, build the mixture, train its router, save it."""
    router_args, args, model_args = TrlParser((RouterArguments, SFTConfig, ModelConfig)).parse_args_and_config()
    start = time.time()
    set_seed(args.seed)
    train, heldout = load_data(router_args, args.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    base = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        dtype=model_args.dtype,
        quantization_config=get_quantization_config(model_args),
    )
    model = get_peft_model(base, mixture_config(router_args))
    model.print_trainable_parameters()
    fitted = fit_router(model, train, tokenizer) if router_args.fit else None

    trainer = MoLoraSFTTrainer(
        model, args=args, train_dataset=train, eval_dataset=heldout, processing_class=tokenizer
    )
    before = trainer.evaluate()["eval_loss"]
    resume = args.resume_from_checkpoint
    if resume in ("last", "true", "True"):
        resume = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
    trainer.train(resume_from_checkpoint=resume)
    after = trainer.evaluate()
    trainer.save_model(args.output_dir)
    summary = {
        "heldout_loss_before": round(before, 4),
        "heldout_loss": round(after["eval_loss"], 4),
        "router_entropy": round(after.get("eval_router_entropy", 0.0), 4),
        "load": {k[10:]: round(v, 3) for k, v in after.items() if k.startswith("eval_load/")},
        "fitted_training_accuracy": fitted and round(fitted.training_accuracy, 4),
        "steps": trainer.state.global_step,
        "seconds": round(time.time() - start),
    }
    with open(os.path.join(args.output_dir, "summary.json"), "w") as file:
        json.dump(summary, file, indent=1)
    print(f"Saved {args.output_dir}: {summary}")


if __name__ == "__main__":
    main()
