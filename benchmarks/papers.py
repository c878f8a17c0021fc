"""The common part of the paper reproductions: texts, training, stored scores, intervals and verdicts.

A cell is the result of one method and seed: one line of ``cells.jsonl`` in ``--out``. A second run skips
finished cells. A cell holds the summed loss in nats and the tokens of every held-out record; all figures are
computed from these.

Letters: D bootstrap draws, S seeds, N records.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from peft_moe.evaluation import score_texts
from peft_moe.evaluation.bakeoff.statistics import (
    Array,
    Estimate,
    draw_seeds,
    draw_texts,
    estimate,
    over_seeds,
    ratio,
    share,
)
from peft_moe.io.text_data import load_text_dataset

Sample = dict[str, str]
Scores = dict[str, list[tuple[float, int]]]
RESULTS = Path(__file__).parent / "results"
FFN = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
HELD, NOT, OPEN = "held", "did not hold", "not decidable here"
UNTESTED = "not tested"
# Differences below this share of the oracle's gain over the base count as none.
MARGIN = 0.10


# -- text and models ---------------------------------------------------------------------------------


def read(data: Path, folders: Sequence[str], domain: str, split: str, count: int, seed: int) -> list[Sample]:
    """Read ``count`` records of a domain, from its folders in turn."""
    parts = []
    for folder in folders:
        rows = load_text_dataset(data / folder / f"{split}.jsonl").shuffle(seed=seed)
        rows = rows.select(range(min(len(rows), -(-count // len(folders)))))
        parts.append([{"prompt": r["prompt"], "completion": r["completion"], "domain": domain} for r in rows])
    return [row for turn in zip_longest(*parts) for row in turn if row is not None][:count]


def load(folder: str | Path) -> Any:
    """Load a causal language model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def fresh_lora(base: Any, rank: int) -> Any:
    """Add a LoRA to all linear layers as in text_expert.yaml, with alpha at twice the rank."""
    return get_peft_model(
        base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=FFN + ATTENTION, task_type="CAUSAL_LM")
    )


def scores_of(model: Any, tokenizer: Any, texts: Mapping[str, list[Sample]], length: int) -> Scores:
    """Return the summed loss and the tokens of every record's completion, by domain."""
    scores: Scores = {}
    for domain, rows in texts.items():
        turns = score_texts(
            model,
            tokenizer,
            [[(r["prompt"], r["completion"])] for r in rows],
            batch_size=16,
            max_length=length,
        )
        scores[domain] = [(turn.nll, turn.tokens) for (turn,) in turns]
    return scores


def losses_of(scores: Scores) -> dict[str, float]:
    """Return the loss of every domain in nats per token."""
    return {d: sum(nll for nll, _ in s) / sum(tokens for _, tokens in s) for d, s in scores.items()}


# -- cells -------------------------------------------------------------------------------------------


class Cells:
    """The finished cells of a run, one JSON line each."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "cells.jsonl"
        lines = self.path.read_text().split("\n") if self.path.exists() else []
        complete = [line for line in lines if line.endswith("}")]  # the last line may be cut off
        self.done: list[dict[str, Any]] = [json.loads(line) for line in complete]
        if self.path.exists():
            self.path.write_text("".join(line + "\n" for line in complete))

    def check(self, plan: dict[str, Any]) -> None:
        """Refuse to continue a run with another plan."""
        path = self.path.with_name("plan.json")
        if path.exists() and json.loads(path.read_text()) != plan:
            raise SystemExit(f"{path} has other sizes than {plan}; give another --out")
        path.write_text(json.dumps(plan))

    def has(self, method: str, seed: int) -> bool:
        return any(c["method"] == method and c["seed"] == seed for c in self.done)

    def run(self, method: str, seed: int, make: Callable[[], dict[str, Any]]) -> None:
        """Make a cell unless it exists, with ``seed`` as torch's seed."""
        if self.has(method, seed):
            return
        set_seed(seed)
        wall, cpu = time.time(), time.process_time()
        result = make()
        times = {"seconds": round(time.time() - wall, 1), "cpu_s": round(time.process_time() - cpu, 1)}
        self.add({"method": method, "seed": seed} | result | times)

    def drop(self, methods: Sequence[str], seed: int) -> None:
        """Remove cells that can only be made together."""
        self.done = [c for c in self.done if c["seed"] != seed or c["method"] not in methods]
        self.path.write_text("".join(json.dumps(cell) + "\n" for cell in self.done))

    def add(self, cell: dict[str, Any]) -> None:
        self.done.append(cell)
        with self.path.open("a") as file:
            file.write(json.dumps(cell) + "\n")
        scores = cell.get("scores", {})
        means = " ".join(f"{d} {v:.3f}" for d, v in losses_of(scores).items())
        print(f"{cell['method']:32} seed {cell['seed']} {cell.get('cpu_s', 0):6.1f} s  {means}", flush=True)


# -- figures -----------------------------------------------------------------------------------------


class Figures:
    """Losses and shares of all methods over the same bootstrap draws of records and seeds.

    Args:
        cells: finished cells; a method with a single seed stands for all seeds.
        domains: domains whose losses are averaged.
        draws: number of bootstrap draws.
    """

    def __init__(self, cells: Sequence[Mapping[str, Any]], domains: Sequence[str], draws: int = 2000) -> None:
        self.scores: dict[str, dict[int, Scores]] = {}
        for cell in cells:
            if "scores" in cell:
                self.scores.setdefault(cell["method"], {})[cell["seed"]] = cell["scores"]
        self.seeds = sorted({seed for by_seed in self.scores.values() for seed in by_seed})
        self.domains, rng = list(domains), np.random.default_rng(0)
        first_scores = next(iter(next(iter(self.scores.values())).values()))
        self.counts = {d: draw_texts(len(rows), draws, rng) for d, rows in first_scores.items()}
        self.weights_DS = draw_seeds(len(self.seeds), draws, rng)

    def losses(self, method: str, domain: str) -> Array:
        """Return the loss in nats per token, [D, S], or [D, 1] for a method with a single seed."""
        by_seed = self.scores[method]
        if len(by_seed) not in (1, len(self.seeds)):
            raise SystemExit(f"{method} has seeds {sorted(by_seed)} of {self.seeds}; finish the run first")
        rows = np.array([by_seed[seed][domain] for seed in sorted(by_seed)])  # [S, N, 2]
        return ratio(self.counts[domain], rows[..., 0], rows[..., 1])

    def means(self, method: str, domains: Sequence[str] | None = None) -> Array:
        """Return the mean of :meth:`losses` over domains."""
        parts = [self.losses(method, d) for d in domains or self.domains]
        return np.mean(parts, axis=0)

    def shares(
        self, method: str, oracle: Mapping[str, str], base: str = "base", domains: Sequence[str] | None = None
    ) -> Array:
        """Return the share of the oracle's gain over the base, from losses averaged over domains.

        The oracle uses each domain's own expert. The losses are averaged first, because a domain with almost
        no gain would dominate a mean of shares.
        """
        domains = list(domains or self.domains)
        best_DS = np.mean(np.broadcast_arrays(*(self.losses(oracle[d], d) for d in domains)), axis=0)
        return share(self.means(method, domains), self.means(base, domains), best_DS)

    def estimate(self, values_DS: Array) -> Estimate:
        """Return the mean over seeds with its 95 % interval over records and seeds."""
        values_DS = np.broadcast_to(values_DS, self.weights_DS.shape)
        return estimate(over_seeds(values_DS, self.weights_DS))

    def spread(self, values_DS: Array) -> float:
        """Return the standard deviation over seeds on the original records; NaN for a single seed."""
        return float(np.std(values_DS[0], ddof=1)) if values_DS.shape[1] > 1 else float("nan")


# -- verdicts ----------------------------------------------------------------------------------------


def above_zero(e: Estimate) -> str:
    """Judge the claim that a difference is above zero."""
    return HELD if e.low > 0 else NOT if e.high < 0 else OPEN


def no_worse(e: Estimate, margin: float = MARGIN) -> str:
    """Judge the claim that a difference, where less is worse, is above ``-margin``."""
    return HELD if e.low > -margin else NOT if e.high < -margin else OPEN


def alike(e: Estimate, margin: float = MARGIN) -> str:
    """Judge the claim that a difference lies within ±``margin``."""
    if -margin < e.low and e.high < margin:
        return HELD
    return NOT if e.high < -margin or e.low > margin else OPEN


def all_of(verdicts: Sequence[str]) -> str:
    """Combine the verdicts on the parts of a claim."""
    return HELD if set(verdicts) == {HELD} else NOT if NOT in verdicts else OPEN


MARKS = {HELD: "✓", NOT: "✗", OPEN: "?"}


def nats(e: Estimate) -> str:
    """Format an estimate in nats per token."""
    return f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]"


def points(e: Estimate) -> str:
    """Format an estimate in points of the oracle's gain."""
    return f"{100 * e.value:+.0f} [{100 * e.low:+.0f}, {100 * e.high:+.0f}]"


def percent(e: Estimate) -> str:
    """Format a share in %."""
    return f"{100 * e.value:.2f} % [{100 * e.low:.2f}, {100 * e.high:.2f}]"


class Claims:
    """The claims of a paper and their verdicts here, which follow from the figures."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(
        self,
        claim: str,
        parts: Mapping[str, Estimate],
        judge: Callable[[Estimate], str],
        unit: Callable[[Estimate], str],
    ) -> None:
        """Add a claim that holds if ``judge`` says so for every part."""
        verdicts = {name: judge(e) for name, e in parts.items()}
        evidence = "; ".join(f"{name}: {unit(e)} {MARKS[verdicts[name]]}" for name, e in parts.items())
        held = sum(v == HELD for v in verdicts.values())
        row = {"claim": claim, "verdict": all_of(list(verdicts.values())), "held": held, "parts": len(parts)}
        self.rows.append(row | {"evidence": evidence})

    def leave(self, claim: str, reason: str) -> None:
        """Add a claim that was not tested."""
        self.rows.append({"claim": claim, "verdict": UNTESTED, "held": 0, "parts": 0, "evidence": reason})

    def table(self) -> list[str]:
        """Return one row per claim, and the number of each verdict."""
        lines = ["| claim of the paper | here | evidence |", "|---|---|---|"]
        for row in self.rows:
            partly = 0 < row["held"] < row["parts"]
            count = f"; {row['held']} of {row['parts']} parts held" if partly else ""
            lines.append(f"| {row['claim']} | **{row['verdict']}**{count} | {row['evidence']} |")
        words = (HELD, NOT, OPEN, UNTESTED)
        counts = {word: sum(row["verdict"] == word for row in self.rows) for word in words}
        return [*lines, "", "Together: " + ", ".join(f"{n} {word}" for word, n in counts.items() if n) + "."]


def loss_table(
    figures: Figures, rows: Mapping[str, Mapping[str, str] | None], others: Sequence[str]
) -> list[str]:
    """Return held-out losses, mean ± spread over seeds, and the share of the oracle's gain with its interval.

    Args:
        figures: the figures of all methods.
        rows: method → the oracle to compare it with.
        others: domains without an expert.
    """
    heads = [*figures.domains, *(f"{d}*" for d in others)]
    lines = ["| method | " + " | ".join(heads) + " | mean | share of the oracle's gain, % |"]
    lines.append("|---|" + "---:|" * (len(heads) + 2))
    for method, oracle in rows.items():
        cells = [_cell(figures, figures.losses(method, d)) for d in [*figures.domains, *others]]
        cells.append(_cell(figures, figures.means(method)))
        gain = figures.estimate(figures.shares(method, oracle)).scaled(100) if oracle else None
        cells.append(f"{gain.value:.0f} [{gain.low:.0f}, {gain.high:.0f}]" if gain else "")
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return lines


def _cell(figures: Figures, values_DS: Array) -> str:
    mean, spread = figures.estimate(values_DS).value, figures.spread(values_DS)
    return f"{mean:.3f}" if np.isnan(spread) else f"{mean:.3f} ± {spread:.3f}"


def publish(stem: str, lines: Sequence[str], data: dict[str, Any], folder: Path = RESULTS) -> None:
    """Write a page and the data behind it."""
    (folder / f"{stem}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / f"{stem}.json").write_text(json.dumps(data) + "\n", encoding="utf-8")
    print(f"Wrote {folder / stem}.md and .json")


# -- the command line --------------------------------------------------------------------------------


def arguments(doc: str, out: str) -> argparse.Namespace:
    """Parse the arguments of both scripts; with ``--quick``, make a tiny random base."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/text"), help="made by recipes/text/run.sh")
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="a tiny random base: does everything run?")
    parser.add_argument(
        "--publish", metavar="STEM", help="write the page of a finished run, such as 2026-11-26-…"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the page")
    args = parser.parse_args()
    if args.quick:
        args.runs = args.out / "runs"
        make_tiny_runs(args.runs)
    if not (args.runs / "base").exists():
        raise SystemExit(f"No base in {args.runs}. Train it first: PEFT_MOE_DATA=… bash recipes/text/run.sh")
    return args


def make_tiny_runs(runs: Path) -> None:
    """Make a random base of two layers, six random adapters, and demo questions named as the domains."""
    from peft_moe.cli.demo import BASE_NAME, asset_path
    from peft_moe.cli.demo.skills import EXPERTS, generate, write_jsonl

    tokenizer = AutoTokenizer.from_pretrained(asset_path(BASE_NAME))
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    set_seed(0)
    ends = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    LlamaForCausalLM(LlamaConfig(**shape, **ends, vocab_size=len(tokenizer))).save_pretrained(runs / "base")
    tokenizer.save_pretrained(runs / "base")
    skills = sorted(EXPERTS)
    names = ("math", "code", "medicine", "law", "german", "french", "general", "science")
    for number, name in enumerate(names):
        (runs / "data" / name).mkdir(parents=True, exist_ok=True)
        for split, count in (("train", 16), ("test", 8)):
            rows = generate(skills[number % len(skills)], count, seed=number + (split == "test") * 100)
            write_jsonl(runs / "data" / name / f"{split}.jsonl", rows)
        if number < 6:
            fresh_lora(load(runs / "base"), 2).save_pretrained(runs / name)


def in_place(folder: Path, save: Callable[[Path], None]) -> Path:
    """Make ``folder`` with ``save`` unless it exists. An interrupted run leaves no incomplete folder."""
    if not folder.exists():
        temporary = folder.with_name(folder.name + f".part{os.getpid()}")
        temporary.mkdir(parents=True)
        save(temporary)
        temporary.rename(folder)
    return folder
