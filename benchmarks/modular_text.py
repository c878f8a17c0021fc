"""The claims of Modular Experts (arXiv 2407.19610), on real text of three languages and Python.

    PEFT_MOE_DATA=../shared/data bash recipes/text/run.sh          # trains the base and the teacher's experts
    OMP_NUM_THREADS=1 python -m benchmarks.modular_text --runs runs/text --out runs/modular_text
    python -m benchmarks.modular_text --out runs/modular_text --publish 2026-11-26-modular-experts

The paper distils a large model into one expert per language behind a sequence classifier. It compares
pre-trained experts with a router (PLE), experts and router trained together (JEET), and an additional common
expert (MoE-CE); fixed and adaptive weights of the two losses; and forgetting. Here every method trains the
same number of steps on the same number of texts per domain. A second run continues an interrupted one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_fscore_support
from sklearn.pipeline import make_pipeline
from transformers import AutoTokenizer

from benchmarks import papers
from benchmarks.papers import ATTENTION, FFN, HELD, NOT, OPEN, Cells, Claims, Figures, Sample
from peft_moe import MoLoraConfig, record_routing
from peft_moe.evaluation.bakeoff.statistics import Estimate, estimate
from peft_moe.evaluation.bakeoff.training import train
from peft_moe.fitting import fit_router
from peft_moe.routing.controls import use_experts, use_gates
from peft_moe.training.stages import set_stage, write_fresh_experts

# The base was trained on all of the first folder and on a quarter of each other folder.
FOLDERS = {
    "english": ("general", "medicine", "law"),
    "french": ("french",),
    "german": ("german",),
    "python": ("code",),
}
DOMAINS = tuple(FOLDERS)
TEACHERS = ("math", "code", "medicine", "law", "german", "french")
NO_EXPERT = ("general", "science")
# Logistic regression classifies prompts, or complete texts as in the paper's corpora.
READS = ("prompt", "text")
CLAIMED = 0.9995


@dataclass
class Plan:
    """Sizes of a run; a step of joint training holds ``batch_size`` texts of each domain."""

    steps: int = 32
    batch_size: int = 4
    max_length: int = 128
    test_records: int = 24
    router_records: int = 150
    classified: int = 100
    rank: int = 8
    rate: float = 4.0e-3
    bf16: bool = True


QUICK = Plan(steps=2, batch_size=4, test_records=4, router_records=8, classified=6, rank=2, bf16=False)


class Modular:
    """Makes the cells of one seed."""

    def __init__(self, runs: Path, out: Path, cells: Cells, plan: Plan, seed: int) -> None:
        self.runs, self.cells, self.plan, self.seed = runs, cells, plan, seed
        self.home = out / f"seed{seed}"
        self.tokenizer = AutoTokenizer.from_pretrained(runs / "base")
        count = max(plan.steps * plan.batch_size, plan.router_records)
        self.train, self.test = self._texts("train", count, seed), self._texts("test", plan.test_records, 0)
        self.prompts = [row for rows in self.train.values() for row in rows[: plan.router_records]]

    def _texts(self, split: str, count: int, seed: int) -> dict[str, list[Sample]]:
        data = self.runs / "data"
        return {d: papers.read(data, parts, d, split, count, seed) for d, parts in FOLDERS.items()}

    def run(self) -> None:
        """Make all cells."""
        for reads in READS:
            self.cells.run(f"tf-idf {reads}", self.seed, lambda reads=reads: self._tf_idf(reads))
            self.cells.run(f"classifier {reads}", self.seed, lambda reads=reads: self._classifier(reads))
        self._staged("MoE", DOMAINS, {"router": "classifier"}, "own")
        self._joint("JEET", {})
        self._joint("MoE-CE", {"shared_experts": ["common"]})
        self._joint("JEET + KD, fixed", {"distillation_coef": 1.0})
        self._joint("JEET + KD, adaptive", {"distillation_coef": 1.0, "distillation_adaptive": True})
        uniform = {"router": "uniform"}
        self._staged("one LoRA", ("one",), uniform, "all")
        self.cells.run("one LoRA, balanced", self.seed, lambda: self._balanced(uniform))

    def score(self, model: Any) -> Any:
        return papers.scores_of(model.eval(), self.tokenizer, self.test, self.plan.max_length)

    # -- models --------------------------------------------------------------------------------------

    def _mixture(
        self,
        names: tuple[str, ...],
        fields: dict[str, Any],
        rank: int | None = None,
        labelled: list[Sample] | None = None,
    ) -> Any:
        """Build trainable fresh experts behind a router that is fitted to the prompts."""
        base, plan = papers.load(self.runs / "base"), self.plan
        rank = rank or plan.rank
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=FFN + ATTENTION, task_type="CAUSAL_LM")
        folder = self.home / "fresh" / f"{len(names)}-{rank}"
        sources = write_fresh_experts(base, dict.fromkeys(names), lora, folder, 100 * self.seed)
        config = MoLoraConfig(experts=sources, task_type="CAUSAL_LM", train_experts=True, **fields)
        model = get_peft_model(base, config)
        if fields["router"] == "classifier":
            fit_router(model, labelled or self.prompts, self.tokenizer, progress=False)
        return model

    def _fit(self, model: Any, domains: Any, steps: int, batch_size: int, **options: Any) -> None:
        plan = self.plan
        rows = [row for d in domains for row in self.train[d][: plan.steps * plan.batch_size]]
        train(
            model, "mixture", rows, self.tokenizer, steps=steps, batch_size=batch_size,
            learning_rate=plan.rate, max_length=plan.max_length, bf16=plan.bf16, robust={}, seed=self.seed,
            out=self.home / "trainer", **options,
        )  # fmt: skip

    def _teacher(self) -> Any:
        """Build the teacher: the text recipe's six experts, trained longer, behind a ridge router."""
        names = {name: str(self.runs / name) for name in TEACHERS}
        config = MoLoraConfig(experts=names, router="ridge", task_type="CAUSAL_LM", allow_base_mismatch=True)
        model = get_peft_model(papers.load(self.runs / "base"), config)
        parts, count = (*TEACHERS, *NO_EXPERT), self.plan.router_records
        rows = [r for d in parts for r in papers.read(self.runs / "data", [d], d, "train", count, 0)]
        fit_router(model, rows, self.tokenizer, progress=False)
        return model.eval()

    # -- cells ---------------------------------------------------------------------------------------

    def _staged(self, name: str, names: tuple[str, ...], fields: dict[str, Any], trains: str) -> None:
        """Train one domain after the other. Every stage is a cell; all stages are made in one run."""
        ends = [f"{name}, sequential, stage {n}" for n in range(1, len(DOMAINS) + 1)]
        if all(self.cells.has(end, self.seed) for end in ends):
            return
        self.cells.drop(ends, self.seed)
        rank = self.plan.rank * len(DOMAINS) // len(names)
        model = self._mixture(names, fields, rank)
        for domain, end in zip(DOMAINS, ends, strict=True):

            def make(domain: str = domain) -> dict[str, Any]:
                set_stage(model, [domain], trains)
                self._fit(model, [domain], self.plan.steps, self.plan.batch_size)
                return {"scores": self.score(model)}

            self.cells.run(end, self.seed, make)
        if trains == "own":
            self.cells.run("own expert", self.seed, lambda: {"scores": self._own(model)})

    def _own(self, model: Any) -> Any:
        scores = {}
        for domain, rows in self.test.items():
            with use_gates({domain: 1.0}):
                scores |= papers.scores_of(model, self.tokenizer, {domain: rows}, self.plan.max_length)
        return scores

    def _joint(self, name: str, fields: dict[str, Any]) -> None:
        """Train experts and router together, with equal shares of all domains in every step."""
        common = fields.get("shared_experts", [])

        def make() -> dict[str, Any]:
            joint = {"router": "classifier", "router_label_loss_coef": 1.0} | fields
            model = self._mixture((*DOMAINS, *common), joint)
            options = {"teacher": self._teacher()} if "distillation_coef" in fields else {}
            size = self.plan.batch_size * len(DOMAINS)
            self._fit(model, DOMAINS, self.plan.steps, size, balanced_domains=True, **options)
            result = {"scores": self.score(model)}
            if common:
                with use_experts(*DOMAINS):
                    result["without"] = self.score(model)
            return result

        self.cells.run(name, self.seed, make)
        if not common:
            return
        cell = next(c for c in self.cells.done if c["method"] == name and c["seed"] == self.seed)
        if not self.cells.has(f"{name}, common off", self.seed):
            self.cells.add({"method": f"{name}, common off", "seed": self.seed, "scores": cell["without"]})

    def _balanced(self, fields: dict[str, Any]) -> dict[str, Any]:
        model = self._mixture(("one",), fields, self.plan.rank * len(DOMAINS))
        self._fit(model, DOMAINS, self.plan.steps * len(DOMAINS), self.plan.batch_size, balanced_domains=True)
        return {"scores": self.score(model)}

    # -- classification ------------------------------------------------------------------------------

    def _labelled(self, reads: str) -> tuple[list[Sample], list[Sample]]:
        test = self._texts("test", self.plan.classified, 0)
        rows = [row for samples in test.values() for row in samples]
        return [_read_as(r, reads) for r in self.prompts], [_read_as(r, reads) for r in rows]

    def _tf_idf(self, reads: str) -> dict[str, Any]:
        labelled, rows = self._labelled(reads)
        model = make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=1000))
        model.fit([r["prompt"] for r in labelled], [r["domain"] for r in labelled])
        predicted = [str(name) for name in model.predict([r["prompt"] for r in rows])]
        return {"true": [r["domain"] for r in rows], "found": predicted}

    def _classifier(self, reads: str) -> dict[str, Any]:
        labelled, rows = self._labelled(reads)
        labelled = [_cut(r, self.tokenizer, self.plan.max_length) for r in labelled]
        model = self._mixture(DOMAINS, {"router": "classifier"}, labelled=labelled)
        predicted = []
        for row in rows:
            ids = self.tokenizer(row["prompt"], return_tensors="pt").input_ids[:, : self.plan.max_length]
            with torch.no_grad(), record_routing() as record:
                model.eval()(input_ids=ids)
            (decision,) = record.decisions.values()
            predicted.append(DOMAINS[int(decision.logits.flatten().argmax())])
        return {"true": [r["domain"] for r in rows], "found": predicted}


def _read_as(row: Sample, reads: str) -> Sample:
    prompt = row["prompt"] if reads == "prompt" else row["prompt"] + row["completion"]
    return {"prompt": prompt, "domain": row["domain"]}


def _cut(row: Sample, tokenizer: Any, length: int) -> Sample:
    ids = tokenizer(row["prompt"])["input_ids"][:length]
    return row | {"prompt": tokenizer.decode(ids)}


# -- the page ----------------------------------------------------------------------------------------

ORACLE = dict.fromkeys(DOMAINS, "own expert")
PLE, LAST = (f"{name}, sequential, stage {len(DOMAINS)}" for name in ("MoE", "one LoRA"))


def rates(cells: list[dict[str, Any]], method: str, draws: int = 1000) -> tuple[list[list[float]], Any]:
    """Return precision, recall and F1 of each domain and their mean, and the mean F1 with its interval."""
    rng, of_method = np.random.default_rng(0), [c for c in cells if c["method"] == method]
    true, predicted = (np.array([c[key] for c in of_method]) for key in ("true", "found"))

    def rates_on(index: Any) -> Any:
        return np.mean([_each(t[index], p[index]) for t, p in zip(true, predicted, strict=True)], axis=0)

    rows = true.shape[1]
    drawn = [rates_on(rng.integers(0, rows, rows))[:, 2].mean() for _ in range(draws)]
    table = rates_on(np.arange(rows))
    with_mean = [*table.tolist(), table.mean(axis=0).tolist()]
    return with_mean, estimate(np.array([table[:, 2].mean(), *drawn]))


def _each(true: Any, predicted: Any) -> Any:
    p, r, f, _ = precision_recall_fscore_support(true, predicted, labels=list(DOMAINS), zero_division=0.0)
    return np.stack([p, r, f], axis=1)


def reaches(e: Any) -> str:
    """Judge the claim that the mean F1 reaches 99.95 %."""
    return HELD if e.value >= CLAIMED else NOT if e.high < CLAIMED else OPEN


def forgotten(figures: Figures, name: str) -> Any:
    """Return the final loss minus that right after a domain's stage, mean over all but the last domain."""
    end = f"{name}, sequential, stage {len(DOMAINS)}"
    parts = [
        figures.losses(end, d) - figures.losses(f"{name}, sequential, stage {n}", d)
        for n, d in enumerate(DOMAINS[:-1], start=1)
    ]
    return np.mean(parts, axis=0)


def claims(figures: Figures, cells: list[dict[str, Any]]) -> Claims:
    """Judge all claims from the figures."""
    verdicts = Claims()

    def gain(method: str, other: str) -> Estimate:
        return figures.estimate(figures.shares(method, ORACLE) - figures.shares(other, ORACLE))

    def less(method: str, other: str, domains: tuple[str, ...] = DOMAINS) -> Estimate:
        return figures.estimate(figures.means(other, domains) - figures.means(method, domains))

    for kind, title in (("tf-idf", "TF-IDF with logistic regression"), ("classifier", "Our router")):
        verdicts.add(
            f"{title} tells the languages apart with {100 * CLAIMED:.2f} % F1",
            {f"from the {reads}": rates(cells, f"{kind} {reads}")[1] for reads in READS},
            reaches, papers.percent,
        )  # fmt: skip
    both, off = {"PLE": PLE, "JEET": "JEET"}, "MoE-CE, common off"
    verdicts.add("PLE and JEET are alike", {"PLE less JEET": gain(PLE, "JEET")}, papers.alike, papers.points)
    verdicts.add(
        "Both are better than MoE-CE without its common expert",
        {name: less(method, off) for name, method in both.items()},
        papers.above_zero, papers.nats,
    )  # fmt: skip
    verdicts.add(
        "With its common expert MoE-CE comes close to both",
        {f"MoE-CE less {name}": gain("MoE-CE", method) for name, method in both.items()},
        papers.no_worse, papers.points,
    )  # fmt: skip
    verdicts.add(
        "Adaptive α is like fixed α",
        {"adaptive less fixed": gain("JEET + KD, adaptive", "JEET + KD, fixed")},
        papers.alike, papers.points,
    )  # fmt: skip
    verdicts.add(
        "Distillation helps at equal steps: less loss than JEET",
        {a: less(f"JEET + KD, {a}", "JEET") for a in ("fixed", "adaptive")},
        papers.above_zero, papers.nats,
    )  # fmt: skip
    verdicts.leave(
        "Both losses at once beat alternating between them", "the trainer has no schedule that alternates"
    )
    verdicts.add(
        "One model that learns domain after domain forgets",
        {"forgotten": figures.estimate(forgotten(figures, "one LoRA"))},
        papers.above_zero, papers.nats,
    )  # fmt: skip
    verdicts.add(
        "Balanced batches prevent it: less loss on all domains but the last, in as many steps",
        {"one after the other less balanced": less("one LoRA, balanced", LAST, DOMAINS[:-1])},
        papers.above_zero, papers.nats,
    )  # fmt: skip
    # Only what was learnt can be forgotten.
    learnt = figures.estimate(
        np.mean(
            [
                figures.losses("base", d) - figures.losses(f"MoE, sequential, stage {n}", d)
                for n, d in enumerate(DOMAINS[:-1], start=1)
            ],
            axis=0,
        )
    )
    lost, gained = forgotten(figures, "MoE"), figures.means("base") - figures.means("own expert")
    verdicts.add(
        f"A mixture prevents it: it forgets less than {100 * papers.MARGIN:.0f} points of the oracle's gain "
        f"(decidable if it had learnt something: {papers.nats(learnt)} nats)",
        {"less what was forgotten": figures.estimate(-lost / gained)},
        lambda e: papers.no_worse(e) if papers.above_zero(learnt) == HELD else OPEN, papers.points,
    )  # fmt: skip
    return verdicts


def rate_table(cells: list[dict[str, Any]]) -> list[str]:
    """Return precision, recall and F1 of every classifier and domain as a table."""
    lines = [
        "| classifier | reads | " + " | ".join(f"{d} P / R / F1" for d in (*DOMAINS, "mean")) + " |",
        "|---|---|" + "---:|" * (len(DOMAINS) + 1),
    ]
    for kind in ("tf-idf", "classifier"):
        for reads in READS:
            table, _ = rates(cells, f"{kind} {reads}")
            texts = [" / ".join(f"{100 * value:.2f}" for value in row) for row in table]
            lines.append(f"| {kind} | {reads} | " + " | ".join(texts) + " |")
    return lines


def page(cells: Cells, plan: Plan, stem: str, folder: Path) -> None:
    """Write the results page."""
    done = cells.done
    figures = Figures(done, DOMAINS)
    verdicts = claims(figures, done)
    own = {d: figures.estimate(figures.losses("base", d) - figures.losses("own expert", d)) for d in DOMAINS}
    gains = ", ".join(f"{d} {papers.nats(e)}" for d, e in own.items())
    cpu = sum(c.get("cpu_s", 0.0) for c in done) / 60
    tested = len(next(c for c in done if c["method"] == "tf-idf prompt")["true"])
    lines = [
        "# Modular Experts (arXiv 2407.19610), at small scale",
        "",
        f"One 5-million-parameter Llama, real text, {len(figures.seeds)} seeds ({figures.seeds}): of the "
        "training "
        "texts, their order and the experts' start. English is general prose, medicine and law in equal "
        "parts. "
        f"Every domain gives {plan.steps * plan.batch_size} texts of at most {plan.max_length} tokens; "
        "experts of "
        f"rank {plan.rank} on all linear layers. One domain after the other: {plan.steps} steps of "
        f"{plan.batch_size} texts each; joint training: {plan.steps} steps of {plan.batch_size} texts of "
        "each. "
        f"{plan.test_records} test records per domain. {cpu:.0f} minutes of one CPU core.",
        "",
        "- `MoE, sequential`: four experts behind a fitted classifier; a stage trains its own expert alone. "
        "Its "
        "last stage is PLE: pre-trained experts, a router that was fitted on prompts.",
        "- `JEET`: experts and router together. `MoE-CE`: the same with a common expert that is always on; "
        "`common off`: the trained model without it.",
        "- `JEET + KD`: distilled from a mixture of six experts of rank 16 with 500 steps each behind a "
        "`ridge` "
        "router (the base of all is the same). Fixed: α = 0.5; adaptive: it follows how much each loss has "
        "still to fall.",
        f"- `one LoRA`: of rank {plan.rank * len(DOMAINS)}, all experts' together, on one domain after the "
        "other, or "
        f"in balanced batches of as many steps ({plan.steps * len(DOMAINS)} of {plan.batch_size}).",
        "- `own expert`: each domain by its own expert of `MoE`, the oracle.",
        "",
        "## Claims",
        "",
        "Decided by 95 % intervals of a bootstrap over test records and seeds, paired (✓ ✗ ?: of each part). "
        f'"Alike" and "close" are within {100 * papers.MARGIN:.0f} points of the oracle\'s gain. Numbers '
        "are points "
        "where they are whole, else nats per token; above 0 is for the claim.",
        "",
        *verdicts.table(),
        "",
        "## Which language is it?",
        "",
        f"In %, {tested} test records, the mean over seeds, which draw the {plan.router_records} training "
        "records per "
        f"domain. TF-IDF reads everything, our classifier the first {plan.max_length} tokens, as mean "
        "hidden state "
        "of the base's middle layer. The prompts of `python` are tasks in English. Intervals are over "
        "records alone, of the mean over seeds.",
        "",
        *rate_table(done),
        "",
        "## Losses",
        "",
        f"What each own expert gains over the base, in nats: {gains}. Where that is not above 0, the ways of "
        "training cannot differ much: the comparisons above are about the other domains.",
        "",
        "Nats per completion token, mean ± standard deviation over seeds.",
        "",
        *papers.loss_table(
            figures, dict.fromkeys(["base", *(m for m in figures.scores if m != "base")], ORACLE), []
        ),
        "",
        "What differs from the paper: LoRA experts on a base instead of whole models of a language each, "
        "losses "
        "after minutes instead of days, and a teacher that is a mixture of the same base.",
        "",
        f"    python -m benchmarks.modular_text --runs runs/text --out runs/modular_text --publish {stem}",
    ]
    papers.publish(stem, lines, {"plan": asdict(plan), "claims": verdicts.rows, "cells": done}, folder)


def main() -> None:
    args = papers.arguments(__doc__, "runs/modular_text")
    plan, cells = QUICK if args.quick else Plan(), Cells(args.out)
    cells.check(asdict(plan))
    for seed in args.seeds:
        modular = Modular(args.runs, args.out, cells, plan, seed)
        if not any(c["method"] == "base" for c in cells.done):
            base = papers.load(args.runs / "base")
            cells.run("base", seed, lambda m=modular, base=base: {"scores": m.score(base)})
        modular.run()
    if args.publish:
        page(cells, plan, args.publish, args.results)


if __name__ == "__main__":
    main()
