"""Real text: six LoRA experts of one small base, mixed, against the base, each expert and the oracle.

    PEFT_MOE_DATA=../shared/data bash recipes/text/run.sh          # trains base and experts, once
    python benchmarks/text_mixture.py --runs runs/text             # appends a table to benchmarks/results

Domains `general` and `science` have no expert: the base is hard to beat there. `joined` are documents
of two experts' domains, one after the other: with the turns marked, and as one running text, of which
only the part behind the switch is scored. Losses are in nats per completion token. Routers are trained
with three seeds; their cells are mean ± standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from datetime import date
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig

from peft_moe import MoLoraConfig
from peft_moe.evaluation import TurnScore, score_texts, summarise
from peft_moe.fitting import fit_router
from peft_moe.training import MoLoraSFTTrainer

EXPERTS = ("math", "code", "medicine", "law", "german", "french")
ELSEWHERE = ("general", "science")
LENGTH = 256
PER_TOKEN = {
    "router": "context",
    "router_granularity": "token",
    "router_label_loss_coef": 1.0,
}
TRAINED: dict[str, dict[str, Any]] = {
    "context, per prompt": {"router": "context", "router_label_loss_coef": 1.0},
    "context, per token": PER_TOKEN,
    "per module, LM loss": {"router": "linear"},
}
Cells = dict[str, float]


def read(path: Path, count: int, seed: int = 0) -> list[dict[str, str]]:
    """`count` records drawn from a file, each with its domain."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return list(Dataset.from_list(records).shuffle(seed=seed).select(range(min(count, len(records)))))


class Bench:
    """The base, its experts and the texts to score."""

    def __init__(self, runs: Path, records: int, train_records: int, steps: int) -> None:
        self.runs, self.steps = runs, steps
        self.tokenizer = AutoTokenizer.from_pretrained(runs / "base")
        domains = EXPERTS + ELSEWHERE
        data = runs / "data"
        test = {d: read(data / d / "test.jsonl", records) for d in domains}
        self.train = {d: read(data / d / "train.jsonl", train_records) for d in domains}
        self.texts = {d: [[(r["prompt"], r["completion"])] for r in rows] for d, rows in test.items()}
        short = {d: [(r["prompt"], r["completion"][:300]) for r in test[d]] for d in EXPERTS}
        self.pairs = [(a, b) for a in EXPERTS for b in EXPERTS if a != b]
        self.joined = [[short[a][i], short[b][i + 1]] for a, b in self.pairs for i in range(2)]

    def base(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.runs / "base", dtype=torch.float32)

    def mixture(self, **fields: Any) -> Any:
        experts = {name: str(self.runs / name) for name in EXPERTS}
        return get_peft_model(self.base(), MoLoraConfig(experts=experts, task_type="CAUSAL_LM", **fields))

    def score(self, model: Any) -> dict[str, list[list[TurnScore]]]:
        def run(texts: list[Any], **how: Any) -> list[list[TurnScore]]:
            return score_texts(model, self.tokenizer, texts, batch_size=16, max_length=2 * LENGTH, **how)

        scores = {d: run(texts) for d, texts in self.texts.items()}
        scores["joined, marked"] = run(self.joined)
        behind = run(self.joined, turns_marked=False)
        scores["joined, running"] = [turns[1:] for turns in behind]
        return scores

    def cells(self, scores: dict[str, list[list[TurnScore]]]) -> Cells:
        return {row: summarise(t for text in texts for t in text).loss for row, texts in scores.items()}

    def oracle(self, scored: dict[str, dict[str, list[list[TurnScore]]]]) -> Cells:
        cells = {d: self.cells(scored[d])[d] for d in EXPERTS}
        cells |= {d: self.cells(scored["base"])[d] for d in ELSEWHERE}
        owners = [pair for pair in self.pairs for _ in range(2)]
        for row, first in (("joined, marked", 0), ("joined, running", 1)):
            turns = [
                scored[owner][row][i][n - first]
                for i, pair in enumerate(owners)
                for n, owner in enumerate(pair)
                if n >= first
            ]
            cells[row] = summarise(turns).loss
        return cells

    def train_router(self, fields: dict[str, Any], seed: int) -> Any:
        set_seed(seed)
        rows = [
            {"prompt": r["prompt"], "completion": r["completion"], "domain": d}
            for d, records in self.train.items()
            for r in records
        ]
        args = SFTConfig(
            str(self.runs / "router"),
            max_steps=self.steps,
            per_device_train_batch_size=8,
            learning_rate=5.0e-3,
            lr_scheduler_type="cosine",
            weight_decay=0.0,
            max_length=LENGTH,
            seed=seed,
            logging_steps=20,
            save_strategy="no",
            report_to=[],
            bf16=True,
            use_cpu=True,
            gradient_checkpointing=False,
        )
        model = self.mixture(**fields)
        trainer = MoLoraSFTTrainer(
            model, args=args, train_dataset=Dataset.from_list(rows), processing_class=self.tokenizer
        )
        trainer.train()
        return trainer.model.eval()

    def fitted(self) -> Any:
        model = self.mixture(router="context")
        rows = [{"prompt": r["prompt"], "domain": d} for d, records in self.train.items() for r in records]
        print(fit_router(model, rows, self.tokenizer))
        return model


def measure(bench: Bench, seeds: list[int]) -> dict[str, list[Cells]]:
    """Cells of every method, one per seed where something is trained."""
    scored = {"base": bench.score(bench.base())}
    for name in EXPERTS:
        scored[name] = bench.score(PeftModel.from_pretrained(bench.base(), bench.runs / name))
    table = {method: [bench.cells(scores)] for method, scores in scored.items()}
    table["gate-less"] = [bench.cells(bench.score(bench.mixture(router="uniform")))]
    table["context, fitted"] = [bench.cells(bench.score(bench.fitted()))]
    for method, fields in TRAINED.items():
        for seed in seeds:
            start = time.time()
            cells = bench.cells(bench.score(bench.train_router(fields, seed)))
            table.setdefault(method, []).append(cells)
            print(method, seed, f"{time.time() - start:.0f} s", cells, flush=True)
    table["oracle"] = [bench.oracle(scored)]
    return table


def report(table: dict[str, list[Cells]]) -> str:
    """Two Markdown tables: losses, and the share of the oracle's gain."""
    rows = list(table["base"][0])
    base, oracle = table["base"][0], table["oracle"][0]
    head = "| method | " + " | ".join(rows) + " |\n|---" + "|---:" * len(rows) + "|\n"
    losses, shares = head, head
    for method, runs in table.items():
        losses += f"| {method} | " + " | ".join(_cell([c[r] for c in runs], 3) for r in rows) + " |\n"
        gains = {
            r: [100 * (base[r] - c[r]) / (base[r] - oracle[r]) for c in runs]
            for r in rows
            if r not in ELSEWHERE
        }
        worse = {r: [100 * (c[r] - base[r]) / base[r] for c in runs] for r in ELSEWHERE}
        cells = [_cell(gains[r], 0) if r in gains else _cell(worse[r], 1, sign=True) for r in rows]
        shares += f"| {method} | " + " | ".join(cells) + " |\n"
    return (
        f"Loss in nats per completion token:\n\n{losses}\nShare of the oracle's gain over the base in % "
        f"(general, science: change of loss against the base in %, no expert exists):\n\n{shares}"
    )


def _cell(values: list[float], digits: int, sign: bool = False) -> str:
    mean = f"{statistics.mean(values):{'+' if sign else ''}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/text"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--records", type=int, default=60, help="scored per domain")
    parser.add_argument("--train-records", type=int, default=150, help="per domain, for the router")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    if not (args.runs / "base").exists():
        raise SystemExit(f"No base in {args.runs}. Train it first: PEFT_MOE_DATA=… bash recipes/text/run.sh")
    start = time.time()
    table = measure(Bench(args.runs, args.records, args.train_records, args.steps), args.seeds)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    text = (
        f"## Mixture on real text, {date.today()}\n\n"
        f"`python benchmarks/text_mixture.py --records {args.records} --train-records {args.train_records} "
        f"--steps {args.steps} --seeds {' '.join(map(str, args.seeds))}`; commit {commit.stdout.strip()}; "
        f"torch {torch.__version__}, peft {peft.__version__}, transformers {transformers.__version__}; "
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads; "
        f"{time.time() - start:.0f} s.\n\n{report(table)}\n"
    )
    out = Path(__file__).parent / "results" / f"{date.today()}-text-mixture.md"
    out.parent.mkdir(exist_ok=True)
    with out.open("a") as file:
        file.write(text)
    print(text)


if __name__ == "__main__":
    main()
