"""Train only the router of a mixture from preferences or rewards, with TRL's DPO, KTO or GRPO.

    python recipes/train_preferences.py --config recipes/configs/demo_dpo.yaml
    python recipes/train_preferences.py --config recipes/configs/demo_grpo.yaml --beta 0.05
    python recipes/train_preferences.py --config recipes/configs/demo_dpo.yaml --resume_from_checkpoint last

`method` is dpo (columns prompt + chosen + rejected), kto (prompt + completion + label, or pairs) or
grpo (prompt + completion; the completion is the right answer, which `rewards` compare with what the
mixture says: exact, overlap, or a function of your own as `file.py:function`). The mixture is made of
`experts` and `mixture` as in train_router.py, or goes on from a saved one (`adapter`). `reference` is
what the method compares with: start, the mixture as training began, or base, the base without it. All
other keys are those of train_router.py, and of TRL's DPOConfig, KTOConfig or GRPOConfig and ModelConfig.

A router that chooses one expert for sure never tries another: for grpo begin with soft gates
(demo_grpo.yaml), or fit it. Memory: as train_router.py, and GRPO's KV cache.
"""

import json
import os
import sys
import time
from dataclasses import dataclass, field

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, GRPOConfig, KTOConfig, ModelConfig, get_quantization_config

from peft_moe.errors import PeftMoeError, near_matches
from peft_moe.fitting import fit_router
from peft_moe.io.strict_yaml import read_yaml
from peft_moe.io.text_data import PREFERENCES
from peft_moe.training import (
    MoLoraDPOTrainer,
    MoLoraGRPOTrainer,
    MoLoraKTOTrainer,
    StrictTrlParser,
    last_good_checkpoint,
)
from peft_moe.training.recipe_arguments import recipe_data, recipe_mixture
from peft_moe.training.trainers.rewards import reward_named
from peft_moe.tuner.saving.save_load import load_mixture

METHODS = {
    "dpo": (MoLoraDPOTrainer, DPOConfig, "rewards/accuracies"),
    "kto": (MoLoraKTOTrainer, KTOConfig, "loss"),
    "grpo": (MoLoraGRPOTrainer, GRPOConfig, "reward"),
}


@dataclass
class PreferenceArguments:
    """What to mix and what to train on. `$VARIABLES` in file names are expanded."""

    method: str = field(metadata={"help": "dpo, kto or grpo."})
    train_files: dict = field(metadata={"help": "Domain and its file; an expert's name is its domain."})
    experts: dict = field(default_factory=dict, metadata={"help": "Each expert's adapter."})
    mixture: dict = field(default_factory=dict, metadata={"help": "Fields of MoLoraConfig."})
    adapter: str | None = field(default=None, metadata={"help": "A saved mixture to go on from."})
    reference: str | None = field(default=None, metadata={"help": "start (the default) or base."})
    rewards: list[str] = field(default_factory=list, metadata={"help": "For grpo, by name."})
    samples_per_domain: int = field(default=500, metadata={"help": "At most; drawn from each file."})
    eval_fraction: float = field(default=0.1, metadata={"help": "Held out of those."})
    fit: bool = field(default=False, metadata={"help": "Solve the router before training it."})


def parser_for(method: str | None) -> StrictTrlParser:
    """The arguments of one method."""
    if method not in METHODS:
        raise PeftMoeError(f"method={method!r} is unknown.{near_matches(str(method), METHODS)}")
    return StrictTrlParser((PreferenceArguments, METHODS[method][1], ModelConfig))


def asked_method(given: list[str]) -> str | None:
    """The method of the command line, or of the file that it names."""
    if "--method" in given[:-1]:
        return given[given.index("--method") + 1]
    return read_yaml(given[given.index("--config") + 1]).get("method") if "--config" in given[:-1] else None


def make_model(asked: PreferenceArguments, model_args: ModelConfig, args: object) -> dict:
    """What the trainer is given: a base's name and a new mixture, or a saved mixture on its base."""
    if bool(asked.experts) == bool(asked.adapter):
        raise PeftMoeError("Give either `experts`, for a new mixture, or `adapter`, a saved one.")
    loading = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (args.model_init_kwargs or {})
    packed = get_quantization_config(model_args)
    if asked.experts:
        args.model_init_kwargs = loading
        config = recipe_mixture(asked.experts, asked.mixture, model_args)
        return {"model": model_args.model_name_or_path, "peft_config": config, "quantization_config": packed}
    if asked.mixture or asked.fit:
        raise PeftMoeError("`mixture` and `fit` are for a new mixture; with `adapter` leave them out.")
    args.model_init_kwargs = None
    base = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path, quantization_config=packed, **loading
    )
    return {"model": load_mixture(base, os.path.expandvars(asked.adapter), is_trainable=True)}


def scores(trainer: object, names: list[str]) -> dict[str, dict[str, float]]:
    """The held-out metrics of these names, by domain: TRL's own would all be called the same."""
    found = {domain: trainer.evaluate(some) for domain, some in trainer.eval_dataset.items()}
    return {domain: {n: round(values[f"eval_{n}"], 4) for n in names} for domain, values in found.items()}


if __name__ == "__main__":
    asked, args, model_args = parser_for(asked_method(sys.argv[1:])).parse_args_and_config()
    start = time.time()
    resume: str | None = args.resume_from_checkpoint
    if resume in ("last", "true", "True"):
        resume = last_good_checkpoint(args.output_dir)
        print(f"Resuming from {resume or 'nothing: there is no whole checkpoint in ' + args.output_dir}")
    given = {"reference": asked.reference}
    if asked.method == "grpo":
        given["reward_funcs"] = [reward_named(name) for name in asked.rewards or ["exact"]]
    elif asked.rewards:
        raise PeftMoeError(f"rewards={asked.rewards} have no effect with method={asked.method}.")
    kinds = PREFERENCES[asked.method]
    sizes = asked.samples_per_domain, asked.eval_fraction
    train, heldout = recipe_data(asked.train_files, *sizes, args.seed, kinds)
    if asked.method == "grpo":
        train = train.rename_column("completion", "answer")
        heldout = {name: some.rename_column("completion", "answer") for name, some in heldout.items()}
    given["processing_class"] = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    set_seed(args.seed)
    trainer_class, _, metric = METHODS[asked.method]
    given |= make_model(asked, model_args, args)
    trainer = trainer_class(args=args, train_dataset=train, eval_dataset=heldout, **given)
    trainer.model.print_trainable_parameters()
    if asked.fit and not resume:  # a checkpoint brings its own router
        fit_router(trainer.model, train, given["processing_class"])
    columns = trainer.mixture.expert_names + (["null"] if trainer.mixture.null_expert else [])
    before = None if resume else scores(trainer, [metric])
    trainer.train(resume_from_checkpoint=resume)
    found = scores(trainer, [metric, *(f"load/{name}" for name in columns)])
    trainer.save_model(args.output_dir)
    after = {domain: values[metric] for domain, values in found.items()}
    summary = {
        "metric": metric,
        "before": before and {domain: values[metric] for domain, values in before.items()},
        "after": after,
        "load": {d: {name: values[f"load/{name}"] for name in columns} for d, values in found.items()},
        "steps": trainer.state.global_step,
        "seconds": round(time.time() - start),
    }
    with open(os.path.join(args.output_dir, "summary.json"), "w") as file:
        json.dump(summary, file, indent=1)
    print(f"domain, held-out {metric}, share of the gates per expert")
    for domain, shares in summary["load"].items():
        print(f"  {domain:12} {after[domain]:.4f}  " + "  ".join(f"{n} {s:.2f}" for n, s in shares.items()))
    print(f"Saved {args.output_dir} after {summary['steps']} steps, {summary['seconds']} s.")
