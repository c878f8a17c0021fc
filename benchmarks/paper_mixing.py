"""The claims of "Flexible and Effective Mixing of LLMs into a Mixture of Domain Experts" (arXiv 2408.17280).

    PEFT_MOE_DATA=../shared/data bash recipes/text/run.sh          # trains the base, once
    OMP_NUM_THREADS=1 python -m benchmarks.paper_mixing --runs runs/text --out runs/paper_mixing
    python -m benchmarks.paper_mixing --out runs/paper_mixing --publish 2026-11-26-paper-mixing

The paper mixes trained models: the feed-forward networks of each, behind a gate, in the place of those of a
base. Here every domain has a full fine-tuned model and a LoRA adapter, trained alike for each seed. Mixed are
the models' networks (FFN), the adapters per linear layer (LoRA), and the adapters at the output of each
network (LoRA-FFN): gate-less, with the noisy gate, with trained routers, of 2 and of 4 experts. Started
again, it goes on where it stopped.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from transformers import AutoTokenizer, set_seed

from benchmarks import papers
from benchmarks.papers import ATTENTION, FFN, Cells, Figures, Sample, Scores
from peft_moe import MoLoraConfig
from peft_moe.controls import use_gates
from peft_moe.evaluation.bakeoff.training import train
from peft_moe.experts.extract import extract_adapter

DOMAINS = ("math", "code", "medicine", "law")
FEW = {2: DOMAINS[:2], 4: DOMAINS}
OTHER = "general"
# The paper's noisy gate is a fixed linear one with random weights in front of a top-k.
GATES: dict[str, dict[str, Any]] = {
    "gate-less": {"router": "uniform"},
    "noisy": {"router": "random"},
    "trained": {"router": "linear"},
}
KINDS = {"FFN": "dense", "LoRA": "adapter", "LoRA-FFN": "adapter"}


@dataclass
class Plan:
    """Sizes of a run; steps of batches of ``batch_size`` texts of at most ``max_length`` tokens."""

    expert_steps: int = 100
    router_steps: int = 40
    batch_size: int = 4
    max_length: int = 128
    test_records: int = 28
    rank: int = 16
    full_rate: float = 3.0e-4
    lora_rate: float = 3.0e-3
    router_rate: float = 5.0e-3
    attention_rate: float = 1.0e-3
    bf16: bool = True


QUICK = Plan(expert_steps=2, router_steps=2, batch_size=2, test_records=4, rank=2, bf16=False)


class Mixing:
    """Makes the cells of one seed."""

    def __init__(self, runs: Path, out: Path, cells: Cells, plan: Plan, seed: int) -> None:
        self.base, self.data, self.cells, self.plan, self.seed = (
            runs / "base",
            runs / "data",
            cells,
            plan,
            seed,
        )
        self.home = out / f"seed{seed}"
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        count = plan.expert_steps * plan.batch_size
        self.train = {d: papers.read(self.data, [d], d, "train", count, seed) for d in DOMAINS}
        self.test = {
            d: papers.read(self.data, [d], d, "test", plan.test_records, 0) for d in (*DOMAINS, OTHER)
        }

    def run(self) -> None:
        """All cells."""
        for number, domain in enumerate(DOMAINS):
            # Another order and start for each expert: with one seed their `lora_A` would start equal.
            self._expert("full", domain, 100 * self.seed + number)
            self._expert("adapter", domain, 100 * self.seed + 50 + number)
        self._dense(self.base, DOMAINS, "base")
        self.cells.run("FFN/oracle", self.seed, self._oracle)
        for count, domains in FEW.items():
            for kind in KINDS:
                for gate, fields in GATES.items():
                    self._mixture(f"{kind}/{gate}/{count}", kind, domains, fields, gate == "trained")
            more = GATES["trained"] | {"modules_to_save": ATTENTION}
            self._mixture(f"FFN/trained+attention/{count}", "FFN", domains, more, True)
        for domain in DOMAINS:
            others = [d for d in DOMAINS if d != domain]
            self._dense(self.home / "full" / domain, others, domain)
            # What serves as the base is an expert as well: the choice that changes nothing.
            fields = GATES["gate-less"] | {"null_expert": True}
            self._mixture(f"FFN on {domain}/gate-less/4", "FFN", others, fields, False, domain)

    def score(self, model: Any) -> dict[str, Any]:
        return {"scores": papers.scores_of(model.eval(), self.tokenizer, self.test, self.plan.max_length)}

    def _fit(self, model: Any, kind: str, rows: list[Sample], steps: int, rate: float, seed: int) -> None:
        plan = self.plan
        train(
            model, kind, rows, self.tokenizer, steps=steps, batch_size=plan.batch_size, learning_rate=rate,
            max_length=plan.max_length, bf16=plan.bf16, robust={}, seed=seed, out=self.home / "trainer",
        )  # fmt: skip

    def _expert(self, kind: str, domain: str, seed: int) -> None:
        plan, full = self.plan, kind == "full"

        def save(folder: Path) -> None:
            set_seed(seed)
            model = papers.load(self.base)
            if not full:
                model = papers.fresh_lora(model, plan.rank)
            rate = plan.full_rate if full else plan.lora_rate
            self._fit(model, "width", self.train[domain], plan.expert_steps, rate, seed)
            model.save_pretrained(folder)

        def make() -> dict[str, Any]:
            folder = papers.in_place(self.home / kind / domain, save)
            model = papers.load(folder if full else self.base)
            return self.score(model if full else PeftModel.from_pretrained(model, folder))

        self.cells.run(f"{kind} {domain}", self.seed, make)

    def _dense(self, base: Path, domains: tuple[str, ...] | list[str], name: str) -> None:
        """All that the models' feed-forward networks differ in from those of ``base``."""

        def save(folder: Path, domain: str) -> None:
            full, only = self.home / "full" / domain, {"dense": True, "target_modules": FFN}
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", message=".*which the adapter leaves out"
                )  # as the paper does
                extract_adapter(base, full, folder, **only, progress=False, overwrite=True)  # type: ignore[arg-type]

        for domain in domains:
            place = self.home / "dense" / name / domain
            papers.in_place(place, lambda folder, domain=domain: save(folder, domain))

    def _mixed(self, kind: str, domains: Any, fields: Mapping[str, Any], base: str = "base") -> PeftModel:
        dense = KINDS[kind] == "dense"
        home = self.home / "dense" / base if dense else self.home / "adapter"
        model = papers.load(self.base if base == "base" else self.home / "full" / base)
        config = MoLoraConfig(
            experts={d: str(home / d) for d in domains},
            mixing="linear" if kind == "LoRA" else "block",
            task_type="CAUSAL_LM",
            **({"top_k": max(1, len(domains) // 2)} if fields["router"] == "random" else {}),
            **fields,
        )
        return get_peft_model(model, config)  # type: ignore[return-value]

    def _mixture(
        self, name: str, kind: str, domains: Any, fields: Mapping[str, Any], trains: bool, base: str = "base"
    ) -> None:
        plan = self.plan

        def make() -> dict[str, Any]:
            model = self._mixed(kind, domains, fields, base)
            if trains:
                each = plan.router_steps * plan.batch_size // len(domains)
                rows = [row for d in domains for row in self.train[d][:each]]
                rate = plan.attention_rate if "modules_to_save" in fields else plan.router_rate
                self._fit(model, "mixture", rows, plan.router_steps, rate, self.seed)
            return self.score(model)

        self.cells.run(name, self.seed, make)

    def _oracle(self) -> dict[str, Any]:
        """Each domain by its own model's networks in the base: what perfect gates would reach."""
        model = self._mixed("FFN", DOMAINS, GATES["gate-less"]).eval()
        scores: Scores = {}
        for domain, rows in self.test.items():
            with use_gates({domain: 1.0} if domain in DOMAINS else dict.fromkeys(DOMAINS, 0.0)):
                scores |= papers.scores_of(model, self.tokenizer, {domain: rows}, self.plan.max_length)
        return {"scores": scores}


# -- the page ----------------------------------------------------------------------------------------


def oracle_of(method: str) -> dict[str, str]:
    """What a method's gain is measured by: each domain's own model, or its own adapter."""
    kind = "adapter" if method.startswith(("LoRA", "adapter")) else "full"
    return {d: f"{kind} {d}" for d in DOMAINS}


def gain(figures: Figures, method: str, other: str) -> Any:
    """How much more of the oracle's gain a method keeps than another, over its experts' domains."""
    domains = FEW[int(method[-1])]
    one, two = (figures.shares(m, oracle_of(m), domains=domains) for m in (method, other))
    return figures.estimate(one - two)


def less(figures: Figures, method: str, other: str, domains: Any) -> Any:
    """By how many nats a method's loss is below another's."""
    return figures.estimate(figures.means(other, domains) - figures.means(method, domains))


def claims(figures: Figures) -> list[tuple[str, str, str]]:
    """(claim, verdict, evidence): all from the figures."""
    found = []

    def add(text: str, parts: dict[str, Any], judge: Any, unit: Any) -> None:
        evidence = "; ".join(f"{name}: {unit(e)} → {judge(e)}" for name, e in parts.items())
        found.append((text, papers.all_of([judge(e) for e in parts.values()]), evidence))

    pairs = [(kind, count) for kind in KINDS for count in FEW]
    add(
        "Gate-less is the best or highly competitive: no worse than the noisy gate",
        {f"{k}, {c}": gain(figures, f"{k}/gate-less/{c}", f"{k}/noisy/{c}") for k, c in pairs},
        papers.no_worse, papers.points,
    )  # fmt: skip
    add(
        "… and no worse than a trained router",
        {f"{k}, {c}": gain(figures, f"{k}/gate-less/{c}", f"{k}/trained/{c}") for k, c in pairs},
        papers.no_worse, papers.points,
    )  # fmt: skip
    add(
        "Training the router helps on some domains (the paper: mainly on GSM8K)",
        {
            f"{k}, {d}": less(figures, f"{k}/trained/4", f"{k}/gate-less/4", [d])
            for k in KINDS for d in DOMAINS
        },
        papers.above_zero, papers.nats,
    )  # fmt: skip
    for gate in GATES:
        add(
            f"Mixing FFN layers is better than mixing LoRA adapters: {gate}, loss over all four domains",
            {f"{c} experts": less(figures, f"FFN/{gate}/{c}", f"LoRA/{gate}/{c}", FEW[c]) for c in FEW},
            papers.above_zero, papers.nats,
        )  # fmt: skip
    add(
        "… the same adapters, mixed at the output of each network instead of per linear layer",
        {
            f"{g}, {c}": less(figures, f"LoRA-FFN/{g}/{c}", f"LoRA/{g}/{c}", domains)
            for g in GATES for c, domains in FEW.items()
        },
        papers.above_zero, papers.nats,
    )  # fmt: skip
    names = {d: "FFN/gate-less/4" if d == "base" else f"FFN on {d}/gate-less/4" for d in ("base", *DOMAINS)}
    add(
        "The base matters: a domain's own model as the base is better on that domain than every other base",
        {
            f"{d}, against {o}": less(figures, names[d], names[o], [d])
            for d in DOMAINS for o in names if o != d
        },
        papers.above_zero, papers.nats,
    )  # fmt: skip
    parts, mixes = {}, [m for m in figures.scores if m.endswith("/4") or m.endswith("/2")]
    for domain in DOMAINS:
        best = min(mixes, key=lambda m, d=domain: figures.losses(m, d)[0].mean())
        parts[f"{domain}, `{best}` against its own model"] = less(figures, best, f"full {domain}", [domain])
    add(
        "Some mix beats a domain's own model (the best mix by the test itself, which favours it)",
        parts, papers.above_zero, papers.nats,
    )  # fmt: skip
    add(
        "Some mix beats the base and every single model over all four domains",
        {
            f"`FFN/gate-less/4` against {m}": less(figures, "FFN/gate-less/4", m, DOMAINS)
            for m in ("base", *(f"full {d}" for d in DOMAINS))
        }
        | {"`FFN/trained/4` against base": less(figures, "FFN/trained/4", "base", DOMAINS)},
        papers.above_zero, papers.nats,
    )  # fmt: skip
    add(
        "Training attention beside the router helps",
        {
            f"{c} experts": less(figures, f"FFN/trained+attention/{c}", f"FFN/trained/{c}", domains)
            for c, domains in FEW.items()
        },
        papers.above_zero, papers.nats,
    )  # fmt: skip
    add(
        "Gate-less is for few experts: it keeps less of 4 experts' gain than of 2 experts'",
        {
            k: figures.estimate(
                figures.shares(f"{k}/gate-less/2", oracle_of(k), domains=FEW[2])
                - figures.shares(f"{k}/gate-less/4", oracle_of(k), domains=FEW[2])
            )
            for k in KINDS
        },
        papers.above_zero, papers.points,
    )  # fmt: skip
    return found


def page(cells: Cells, plan: Plan, stem: str, folder: Path) -> None:
    """Write the results page."""
    figures = Figures(cells.done, DOMAINS)
    order = ["base", *(m for m in figures.scores if m != "base")]
    verdicts = claims(figures)
    cpu = sum(c.get("cpu_s", 0.0) for c in cells.done) / 60
    lines = [
        "# Flexible and Effective Mixing of LLMs (arXiv 2408.17280), at small scale",
        "",
        f"One 5-million-parameter Llama, real text, {len(figures.seeds)} seeds ({figures.seeds}): of the "
        "experts' "
        "data, order and start, of the noisy gate and of router training. For every domain a full fine-tuned "
        f"model and a LoRA of rank {plan.rank} on all linear layers, {plan.expert_steps} steps of "
        f"{plan.batch_size} texts each; routers {plan.router_steps} steps; texts of at most "
        f"{plan.max_length} "
        f"tokens, {plan.test_records} test records per domain. {cpu:.0f} minutes of one CPU core.",
        "",
        '`FFN/…`: feed-forward networks of the full models mixed in the base (`mixing="block"`, experts of '
        "full "
        "rank), everything else is the base's. `LoRA/…`: adapters mixed per linear layer. `LoRA-FFN/…`: the "
        "same "
        "adapters mixed at the output of each feed-forward network, attention per linear. `gate-less`: equal "
        "weights; `noisy`: a fixed random linear gate, top half; `trained`: a linear gate per place, by the "
        "language loss alone. The number at the end: experts (2: math and code; 4: all). `FFN on math/…`: "
        "the "
        "mathematics model gives attention, embeddings and norms, and its network is one of the four.",
        "",
        "## Claims",
        "",
        'Decided by 95 % intervals of a bootstrap over test records and seeds, paired; "no worse" allows '
        f"{100 * papers.MARGIN:.0f} points of the oracle's gain. A claim of several parts held if all parts "
        "did, and "
        "did not if one did not.",
        "",
        *papers.claim_table(verdicts),
        "",
        "## Losses",
        "",
        "Nats per completion token, mean ± standard deviation over seeds; * no expert. The oracle is each "
        "domain's own model, or its own adapter for `LoRA…`, over all four domains.",
        "",
        *papers.loss_table(figures, {m: oracle_of(m) for m in order}, [OTHER]),
        "",
        "What differs from the paper: losses instead of benchmarks, a base three orders of magnitude "
        "smaller, "
        "experts of one short training each. That a mix is picked by the same test which judges it favours "
        "mixes.",
        "",
        f"    python -m benchmarks.paper_mixing --runs runs/text --out runs/paper_mixing --publish {stem}",
    ]
    papers.publish(stem, lines, {"plan": asdict(plan), "claims": verdicts, "cells": cells.done}, folder)


def main() -> None:
    args = papers.arguments(__doc__, "runs/paper_mixing")
    plan, cells = QUICK if args.quick else Plan(), Cells(args.out)
    cells.check(asdict(plan))
    for seed in args.seeds:
        mixing = Mixing(args.runs, args.out, cells, plan, seed)
        if not any(c["method"] == "base" for c in cells.done):
            cells.run("base", seed, lambda mixing=mixing: mixing.score(papers.load(mixing.base)))
        mixing.run()
    if args.publish:
        page(cells, plan, args.publish, args.results)


if __name__ == "__main__":
    main()
