"""Train only the router of a mixture of LoRA experts, with TRL's SFTTrainer.

    python recipes/train_router.py --config recipes/configs/demo_router.yaml
    python recipes/train_router.py --config recipes/configs/text_router.yaml --seed 1
    python recipes/train_router.py --config recipes/configs/demo_router.yaml --resume_from_checkpoint last

`experts` maps names to trained adapters; `train_files` maps a domain's name to a .jsonl file, a
directory saved by `datasets` or a name on the Hub (with a configuration and a split of its own:
`math: {path: openai/gsm8k, name: main, split: train}`), all with columns prompt + completion, or
messages, or text. A domain without an expert is generic data: with a null expert the router learns
to leave it to the base. `mixture` holds fields of MoLoraConfig; `fit: true` solves the router from
the prompts (seconds) before training refines it; `generic_share`, `domain_randomisation` and
`switching_share` make it robust. All other keys are those of SFTConfig and ModelConfig.

Memory: the base, the experts and one batch of activations; 1.5 GB for the configs here. Held-out losses
end at or a little above those of each domain's own expert; summary.json says where each domain was sent.
"""

import json
import os
import time
from dataclasses import dataclass, field

from datasets import Dataset
from transformers import AutoTokenizer, set_seed
from trl import ModelConfig, SFTConfig, get_quantization_config

from peft_moe import MoLoraConfig
from peft_moe.fitting import fit_router
from peft_moe.training import MoLoraSFTTrainer, StrictTrlParser, last_good_checkpoint
from peft_moe.training.data import augmentation as robustness
from peft_moe.training.recipe_arguments import by_domain, recipe_data, recipe_mixture


@dataclass
class RouterArguments:
    """What to mix and what to train on. `$VARIABLES` in file names are expanded."""

    experts: dict = field(metadata={"help": "Name of each expert and its adapter's folder or Hub id."})
    train_files: dict = field(metadata={"help": "Domain and its file; an expert's name is its domain."})
    mixture: dict = field(default_factory=dict, metadata={"help": "Fields of MoLoraConfig."})
    samples_per_domain: int = field(default=500, metadata={"help": "At most; drawn from each file."})
    eval_fraction: float = field(default=0.1, metadata={"help": "Held out of those."})
    fit: bool = field(default=False, metadata={"help": "Solve the router before training it."})
    generic_share: float | None = field(default=None, metadata={"help": "Share without an expert."})
    domain_randomisation: float = field(default=0.0, metadata={"help": "Share of labels made wrong."})
    switching_share: float = field(default=0.0, metadata={"help": "Share of texts of two domains."})
    balanced_batches: bool = field(default=False, metadata={"help": "Equal shares of domains per step."})


def load_data(args: RouterArguments, seed: int) -> tuple[Dataset, dict[str, Dataset]]:
    """Training records with a column `domain`, and held-out records of each domain."""
    train, heldout = recipe_data(args.train_files, args.samples_per_domain, args.eval_fraction, seed)
    return robustness.with_generic_share(train, args.generic_share, args.experts, seed), heldout


def mixture_config(args: RouterArguments, model_args: ModelConfig) -> MoLoraConfig:
    """The mixture, with an error for each key that would have no effect."""
    return recipe_mixture(args.experts, args.mixture, model_args)


if __name__ == "__main__":
    parser = StrictTrlParser((RouterArguments, SFTConfig, ModelConfig))
    router_args, args, model_args = parser.parse_args_and_config()
    start = time.time()
    resume: str | None = args.resume_from_checkpoint
    if resume in ("last", "true", "True"):
        resume = last_good_checkpoint(args.output_dir)
        print(f"Resuming from {resume or 'nothing: there is no whole checkpoint in ' + args.output_dir}")
    config = mixture_config(router_args, model_args)  # all refusals that need no data come first
    robustness.check_random_domains(config, router_args.domain_randomisation)
    train, heldout = load_data(router_args, args.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    if (args.eos_token or tokenizer.eos_token) is None:
        raise ValueError("The tokenizer has no end-of-text token. Name one with `eos_token`.")
    chats = "messages" in train.column_names or not isinstance(train[0].get("prompt", ""), str)
    if chats and tokenizer.chat_template is None and args.chat_template_path is None:
        raise ValueError("The data are chats, the tokenizer has no template. Name a `chat_template_path`.")

    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (args.model_init_kwargs or {})
    set_seed(args.seed)
    trainer = MoLoraSFTTrainer(
        model_args.model_name_or_path,
        args=args,
        train_dataset=robustness.with_random_domains(train, router_args.domain_randomisation, args.seed),
        eval_dataset=heldout,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=config,
        balanced_domains=router_args.balanced_batches,
    )
    tokenised, share = trainer.train_dataset, router_args.switching_share
    trainer.train_dataset = robustness.with_switches(tokenised, share, args.seed, args.max_length)
    trainer.model.print_trainable_parameters()
    kept = {"train": len(trainer.train_dataset), **{d: len(s) for d, s in trainer.eval_dataset.items()}}
    print(f"{len(config.expert_names)} experts, {len(heldout)} domains; records that fit: {kept}")
    if 0 in kept.values():
        raise ValueError(f"No record is left of one: every prompt reaches max_length={args.max_length}.")

    # A checkpoint brings its own router: fitting one, or scoring it, would be for nothing.
    fitted = fit_router(trainer.model, train, tokenizer) if router_args.fit and not resume else None
    before = None if resume else by_domain(trainer.evaluate(), list(heldout), "loss")
    trainer.train(resume_from_checkpoint=resume)
    metrics = trainer.evaluate()
    trainer.save_model(args.output_dir)
    after = by_domain(metrics, list(heldout), "loss")
    columns = config.expert_names + (["null"] if config.null_expert else [])
    load = {name: by_domain(metrics, list(heldout), f"load/{name}") for name in columns}
    summary = {
        "heldout_loss_before": before,
        "heldout_loss": after,
        "router_entropy": by_domain(metrics, list(heldout), "router_entropy"),
        "load": {domain: {name: load[name][domain] for name in columns} for domain in heldout},
        "fitted_training_accuracy": fitted and round(fitted.training_accuracy, 4),
        "steps": trainer.state.global_step,
        "seconds": round(time.time() - start),
    }
    with open(os.path.join(args.output_dir, "summary.json"), "w") as file:
        json.dump(summary, file, indent=1)
    print("domain, held-out loss, share of the gates per expert")
    for domain, shares in summary["load"].items():
        print(f"  {domain:12} {after[domain]:.4f}  " + "  ".join(f"{n} {s:.2f}" for n, s in shares.items()))
    print(f"Saved {args.output_dir} after {summary['steps']} steps, {summary['seconds']} s.")
