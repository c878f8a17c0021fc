"""Train experts and router together, or one domain after the other (Modular Experts, arXiv 2407.19610).

    python recipes/train_modular.py --config recipes/configs/demo_jeet.yaml
    python recipes/train_modular.py --config recipes/configs/demo_moe_ce.yaml
    python recipes/train_modular.py --config recipes/configs/demo_distil.yaml
    python recipes/train_modular.py --config recipes/configs/demo_stages.yaml

`experts` maps names to trained adapters, or to null for fresh ones, which `lora_r`, `lora_alpha` and
`lora_target_modules` describe. Without `stages` all domains are learnt in one session; with them, one group
of domains after the other. `mixture` holds fields of MoLoraConfig: losses, shared_experts, distillation_coef.
Frozen experts behind a classifier (PLE) are recipes/train_router.py with demo_ple.yaml.

Memory: the base, the experts and one batch of activations; 1.5 GB for the configs here. Prints the
held-out loss of every domain before and after every stage, and what was forgotten; forgetting.json and
.png keep it.
"""

import copy
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import ModelConfig, SFTConfig, get_peft_config

from peft_moe import MoLoraConfig, PeftMoeError
from peft_moe.errors import near_matches
from peft_moe.evaluation.forgetting import ForgettingReport
from peft_moe.evaluation.score import score_texts
from peft_moe.fitting import fit_router
from peft_moe.training import MoLoraSFTTrainer, StrictTrlParser
from peft_moe.training.recipe_arguments import check_mixture_fields, recipe_data
from peft_moe.training.stages import set_stage, write_fresh_experts


@dataclass
class ModularArguments:
    """What to mix, what to train on, in which order. `$VARIABLES` in file names are expanded."""

    experts: dict = field(metadata={"help": "Name of each expert: its adapter, or null for a fresh one."})
    train_files: dict = field(metadata={"help": "Domain and its file; an expert's name is its domain."})
    mixture: dict = field(default_factory=dict, metadata={"help": "Fields of MoLoraConfig."})
    samples_per_domain: int = field(default=500, metadata={"help": "At most; drawn from each file."})
    eval_fraction: float = field(default=0.1, metadata={"help": "Held out of those."})
    fit: bool = field(default=True, metadata={"help": "Solve the router from the prompts at first."})
    balanced_batches: bool = field(default=False, metadata={"help": "Equal shares of domains per step."})
    teacher: str | None = field(default=None, metadata={"help": "Model, adapter or mixture to distil."})
    stages: list[str] | None = field(default=None, metadata={"help": "Domains in order; a+b together."})
    trains: str = field(default="all", metadata={"help": "In a stage: all, own or own_and_shared."})


def load_data(args: ModularArguments, seed: int) -> tuple[Dataset, dict[str, Dataset]]:
    """Training records with a column `domain`, and held-out records of each domain."""
    train, heldout = recipe_data(args.train_files, args.samples_per_domain, args.eval_fraction, seed)
    if "prompt" not in train.column_names or not isinstance(train[0]["prompt"], str):
        raise PeftMoeError("this recipe reads prompt + completion as plain text; convert the files")
    return train, heldout


def stages_of(args: ModularArguments) -> list[list[str]]:
    """The domains of every stage; one stage of all where none are named."""
    stages = [entry.split("+") for entry in args.stages or ["+".join(args.train_files)]]
    for domain in (d for stage in stages for d in stage):
        if domain not in args.train_files:
            near = near_matches(domain, args.train_files)
            raise PeftMoeError(f"stages: {domain!r} is no domain of train_files.{near}")
    return stages


if __name__ == "__main__":
    parser = StrictTrlParser((ModularArguments, SFTConfig, ModelConfig))
    modular, args, model_args = parser.parse_args_and_config()
    start, out = time.time(), Path(args.output_dir)
    if args.resume_from_checkpoint:
        raise PeftMoeError("resume_from_checkpoint: this recipe does not resume; leave it out")
    stages = stages_of(modular)
    check_mixture_fields(modular.mixture)
    if modular.teacher and not modular.mixture.get("distillation_coef"):
        raise PeftMoeError(f"teacher={modular.teacher!r} has no effect; set mixture: distillation_coef")
    train, heldout = load_data(modular, args.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    load = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    base = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **load)
    teacher = AutoModelForCausalLM.from_pretrained(modular.teacher, **load) if modular.teacher else None
    set_seed(args.seed)
    model_args.use_peft = True  # TRL builds a LoraConfig only then
    lora = get_peft_config(model_args)
    sources = write_fresh_experts(base, modular.experts, lora, out / "fresh", args.seed)
    model = get_peft_model(base, MoLoraConfig(experts=sources, task_type="CAUSAL_LM", **modular.mixture))
    if modular.fit:
        fit_router(model, train, tokenizer)

    def losses() -> dict[str, float]:
        """Held-out loss of every domain, in nats per completion token, by the router's own decisions."""
        found = {}
        for domain, rows in heldout.items():
            texts = [[(row["prompt"], row["completion"])] for row in rows]
            scores = [s for t in score_texts(model, tokenizer, texts, max_length=args.max_length) for s in t]
            found[domain] = sum(s.nll for s in scores) / max(1, sum(s.tokens for s in scores))
        return found

    report = ForgettingReport(losses())
    for stage in stages:
        name = "+".join(stage) if modular.stages else "all"
        trained = set_stage(model, stage, modular.trains)
        print(f"Stage {name}: {', '.join(trained)} train{', with the router' * (modular.trains == 'all')}")
        here = copy.deepcopy(args)
        here.output_dir = str(out / "stages" / name)
        trainer = MoLoraSFTTrainer(
            model,
            args=here,
            train_dataset=train.filter(lambda row, stage=stage: row["domain"] in stage),
            processing_class=tokenizer,
            teacher=teacher,
            balanced_domains=modular.balanced_batches,
        )
        trainer.train()
        report.add_stage(name, stage, losses())
        print(report.table())
    report.save(out)
    trainer.save_model(args.output_dir)
    summary = {"heldout_loss_before": report.before, "heldout_loss": report.stages[-1][2]}
    summary |= {"steps_per_stage": trainer.state.global_step, "seconds": round(time.time() - start)}
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    print(f"Saved {args.output_dir} after {len(stages)} stages, {summary['seconds']} s.")
