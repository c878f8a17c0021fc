"""Multi-domain translation: what Chirkova et al. (arXiv 2407.01126) found, tried on a small scale.

    export PEFT_MOE_DATA=../shared/data              # with nmt/en-fr/{it,law,shell}/{train,test}.jsonl
    python -m benchmarks.nmt --out runs/nmt          # half an hour of one core; goes on where it stopped
    python -m benchmarks.nmt --out runs/nmt --publish     # the page and its JSON, under benchmarks/results
    python -m benchmarks.nmt --out /tmp/nmt --quick       # does everything run?

A small Llama is trained on generic pairs, then every system of `plan.SYSTEMS` on top of it with equal steps,
all by the recipes and their options. Finished systems lie in <out>/scores, one file per system and seed; the
claims, and how they are judged, in `claims.py`. Needs `pip install peft-moe[train,fit,bench]`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import runpy
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_moe import MoLoraConfig, PeftMoeError
from peft_moe.io.json_files import write_json
from peft_moe.training.stages import write_fresh_experts
from peft_moe.tuner.config.domains import domain_columns

from .page import publish
from .plan import QUICK, SYSTEMS, Plan, System
from .text import GENERIC, SEEN, UNSEEN, labels_of, prompt, read_lines, score, write_data, write_mix

RECIPES = Path(__file__).parents[2] / "recipes"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Run:
    """One folder of base, systems and scores."""

    def __init__(self, out: Path, plan: Plan) -> None:
        self.out, self.plan = out, plan
        self.base, self.data = out / "base", out / "data"

    def recipe(self, name: str, config: str, folder: Path, **changes: Any) -> Path:
        """Run a recipe on its shipped YAML with changes, unless its folder is finished."""
        if (folder / "summary.json").exists():
            return folder
        settings = yaml.safe_load((RECIPES / "configs" / f"{config}.yaml").read_text(encoding="utf-8"))
        same = {
            "output_dir": str(folder),
            "bf16": self.plan.bf16,
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(settings | same | changes, sort_keys=False), encoding="utf-8")
        script = str(RECIPES / f"{name}.py")
        before, sys.argv = sys.argv, [script, "--config", str(path)]
        try:  # in this process: a new one imports torch and trl for ten seconds
            runpy.run_path(script, run_name="__main__")
        finally:
            sys.argv = before
        gc.collect()
        return folder

    def make_base(self) -> None:
        files = {"train_files": [str(self.data / "base.jsonl")], "sampled_files": [], "eval_files": []}
        self.recipe("train_base", "text_base", self.base, eval_strategy="no", **files | self.plan.base)
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)

    def fresh_base(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)

    def common(self, steps: float, seed: int) -> dict[str, Any]:
        return {
            "model_name_or_path": str(self.base),
            "max_steps": max(1, round(steps)),
            "per_device_train_batch_size": self.plan.batch,
            "learning_rate": self.plan.learning_rate,
            "max_length": self.plan.max_chars + 40,  # a token has a character at least: nothing is cut
            "seed": seed,
        }

    def lora(self, folder: Path, file: Path, rank: int, steps: float, seed: int) -> Path:
        held = {"eval_dataset_name": None, "eval_fraction": 0.01, "max_eval_records": 8}
        adapter = {"lora_r": rank, "lora_alpha": 2 * rank, "dataset_name": str(file)}
        return self.recipe("train_expert", "text_expert", folder, **self.common(steps, seed) | held | adapter)

    def mixture(
        self,
        folder: Path,
        experts: dict[str, str],
        fields: dict[str, Any],
        steps: float,
        one: System,
        seed: int,
    ) -> Path:
        names = (*SEEN, GENERIC) if one.generic else SEEN
        changes = {
            "experts": experts,
            "train_files": {name: str(self.data / f"{name}.jsonl") for name in names},
            # Few are enough for a router that is solved first.
            "samples_per_domain": 300 if one.kind == "routed" else 1_000_000,
            "eval_fraction": 0.01,
            "generic_share": self.plan.generic if one.generic else None,
            "domain_randomisation": self.plan.randomised if one.randomised else 0.0,
            "mixture": fields,
            "fit": one.kind == "routed",
        }
        return self.recipe("train_router", "text_router", folder, **self.common(steps, seed) | changes)

    def build(self, name: str, seed: int) -> Any:
        """Train a system, and give it back as a model to score."""
        one, plan, folder = SYSTEMS[name], self.plan, self.out / "systems" / f"{name}-{seed}"
        if one.kind == "base":
            return self.fresh_base()
        if one.kind == "lora":
            file = folder / "train.jsonl"
            wrong = plan.randomised if one.randomised else 0.0
            write_mix(self.data, file, plan.generic if one.generic else 0.0, wrong, one.labels, seed)
            rank = plan.rank * (plan.top_k if one.active else plan.experts)
            self.lora(folder, file, rank, plan.steps, seed)
        elif one.kind == "joint":
            # Named after domains also where nothing reads labels: other domains count as generic.
            others = 0 if one.labels else plan.experts - len(SEEN)
            names = [*SEEN, *(f"expert{number}" for number in range(others))]
            rank = plan.experts * plan.rank // len(names)
            shape = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM")
            fresh = write_fresh_experts(
                self.fresh_base(), dict.fromkeys(names), shape, folder / "fresh", 100 * seed
            )
            sparse = {"router": "mixtral", "top_k": plan.top_k, "router_aux_loss_coef": 0.01}
            fields = {"router": "oracle"} if one.labels else sparse
            self.mixture(folder, fresh, fields | {"train_experts": True}, plan.steps, one, seed)
        else:
            experts = self.experts_of_domains(seed)
            if one.kind == "experts":
                config = MoLoraConfig(experts=experts, router="oracle", task_type="CAUSAL_LM")
                return get_peft_model(self.fresh_base(), config)
            fields = {"router": "running", "router_label_loss_coef": 1.0}
            self.mixture(folder, experts, fields, 0.2 * plan.steps, one, seed)
        return PeftModel.from_pretrained(self.fresh_base(), folder)

    def experts_of_domains(self, seed: int) -> dict[str, str]:
        """One trained LoRA per domain: together as many ranks as `width`, and 0.8 of its steps."""
        plan, found = self.plan, {}
        for number, domain in enumerate(SEEN):
            folder = self.out / "systems" / f"expert-{domain}-{seed}"
            rank, steps = plan.experts * plan.rank // len(SEEN), 0.8 * plan.steps / len(SEEN)
            self.lora(folder, self.data / f"{domain}.jsonl", rank, steps, 10 * seed + number)
            found[domain] = str(folder)
        return found

    def scores(self, model: Any, one: System) -> dict[str, Any]:
        """Of every domain and everything that the system can be told about it."""
        tests, found = read_lines(self.data / "test.jsonl"), {}
        for domain in (*SEEN, UNSEEN):
            rows = [row for row in tests if row["domain"] == domain]
            for condition in one.conditions(domain):
                labels = labels_of(domain, condition, len(rows))
                columns = None
                if one.labels and one.kind != "lora":
                    column = domain_columns(model.peft_config["default"])
                    columns = torch.tensor([column(label) for label in labels])
                tagged = one.labels and one.kind == "lora"
                told = [
                    {**row, "prompt": prompt(row["src"], tagged=tagged, label=label)}
                    for row, label in zip(rows, labels, strict=True)
                ]
                new_tokens = self.plan.new_tokens if one.translates(domain, condition) else 0
                found[f"{domain}/{condition}"] = score(
                    model.eval(), self.tokenizer, told, columns, new_tokens
                )
        return found

    def cell(self, name: str, seed: int) -> None:
        """Train and score one system, unless its scores are there."""
        path = self.out / "scores" / f"{name}-{seed}.json"
        if path.exists():
            return
        torch.manual_seed(seed)
        start = time.process_time()
        model = self.build(name, seed)
        built = time.process_time() - start
        found = self.scores(model, SYSTEMS[name])
        spent = {"built_s": round(built, 1), "all_s": round(time.process_time() - start, 1)}
        write_json(path, {"system": name, "seed": seed, **spent, "scores": found})
        means = {key: round(sum(one["nll"]) / sum(one["tokens"]), 3) for key, one in found.items()}
        print(f"{name}, seed {seed}: {spent}, loss {means}", flush=True)

    def settle(self) -> None:
        """Note the plan, or refuse to go on under another one.

        Raises:
            PeftMoeError: the folder was begun under another plan.
        """
        path, plan = self.out / "plan.json", json.loads(json.dumps(asdict(self.plan)))
        if path.exists() and json.loads(path.read_text(encoding="utf-8"))["plan"] != plan:
            raise PeftMoeError(f"{path} tells of a run with another plan; take another --out, or delete it")
        source = Path(os.environ.get("PEFT_MOE_DATA", "../shared/data"))
        counts = write_data(source, self.data, self.plan.max_chars, self.plan.tests)
        write_json(path, {"plan": plan, "pairs": counts})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/nmt"))
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, which tell nothing")
    parser.add_argument("--publish", action="store_true", help="write the page from what is finished")
    args = parser.parse_args(arguments)
    if args.publish:
        print(publish(args.out))
        return
    run = Run(args.out.resolve(), QUICK if args.quick else Plan())
    run.settle()
    run.make_base()
    for seed in run.plan.seeds:
        for name in args.systems:
            if name != "base" or seed == run.plan.seeds[0]:
                run.cell(name, seed)


if __name__ == "__main__":
    main()
