"""``peft-moe demo``: a mixture of five LoRA experts of a tiny base, and how well their skills survive."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, set_seed
from transformers.utils import logging as transformers_logging

from ...evaluation import Score, recovered, summarise
from ...io.json_files import write_json
from ...tuner.saving.save_load import save_mixture
from . import BASE_NAME, asset_path
from .data import BASE_SKILLS, TWO_SKILLS, UNSEEN_SKILLS, Turns, router_samples, test_texts
from .methods import (
    Scored,
    Training,
    build_mixture,
    fit_mixture,
    load_base,
    oracle,
    score,
    score_expert,
    train_router,
)
from .skills import EXPERTS, MARKER

GATELESS, FITTED, TRAINED, ORACLE = "gate-less", "router, fitted", "fitted and trained", "oracle"


class Stopwatch:
    """Measures the seconds of each part of the demo."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str, *, spinner: bool = True) -> Iterator[None]:
        """Time a block. Show a spinner unless the block shows its own progress bar."""
        start = time.perf_counter()
        if spinner:
            with self.console.status(f"{name} …"):
                yield
        else:
            self.console.print(f"{name} …")
            yield
        self.seconds[name] = round(time.perf_counter() - start, 1)
        self.console.print(f"[green]✓[/] {name} ({self.seconds[name]:.0f} s)")


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    per_domain: int = 200,
    plan: Training | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the demo, print its table, and save the mixture and ``results.json``.

    Args:
        out: folder to write to; its ``mixture/`` is an ordinary PEFT adapter folder.
        seed: seed of all draws.
        per_domain: test texts per column of the table.
        plan: settings of the router's training.
        console: console to print to.

    Returns:
        The content of ``results.json``.
    """
    console, plan = console or Console(), plan or Training()
    # transformers does not annotate its logging functions.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    set_seed(seed)
    watch = Stopwatch(console)
    tokenizer = AutoTokenizer.from_pretrained(asset_path(BASE_NAME))
    texts = test_texts(per_domain, seed + 1000)
    samples = router_samples(plan.per_expert, seed)
    scored: dict[str, Scored] = {}
    with watch.part("score the base"):
        scored["base"] = score(load_base(), tokenizer, texts)
    for name in EXPERTS:
        with watch.part(f"score expert {name} alone"):
            scored[name] = score_expert(name, tokenizer, texts)
    scored[ORACLE] = oracle(scored, texts)
    with watch.part("score the mixture without gates"):
        scored[GATELESS] = score(build_mixture(router="uniform"), tokenizer, texts)
    with watch.part("fit a router without gradients", spinner=False):
        fitted = fit_mixture(samples, tokenizer, progress=True)
    scored[FITTED] = score(fitted, tokenizer, texts)
    with watch.part(f"train the router, {plan.steps} steps", spinner=False):
        set_seed(seed)
        mixture = train_router(samples, tokenizer, plan, seed, str(out / "trainer"))
    with watch.part("score the trained mixture"):
        scored[TRAINED] = score(mixture, tokenizer, texts)
    results = _results(scored, texts, watch, seed, plan)
    _save(out, mixture, tokenizer, results)
    console.print(_table(results))
    console.print(_verdict(results))
    console.print(f"Saved: {out / 'mixture'} and {out / 'results.json'}.")
    console.print(f"Talk to it: peft-moe chat {out / 'mixture'} --marker '{MARKER}'")
    return results


def _results(
    scored: Mapping[str, Scored],
    texts: Mapping[str, Sequence[Turns]],
    watch: Stopwatch,
    seed: int,
    plan: Training,
) -> dict[str, Any]:
    summary: dict[str, dict[str, Score]] = {
        method: {row: summarise(turn for text in rows[row] for turn in text) for row in texts}
        for method, rows in scored.items()
    }
    shares = {
        method: {
            row: {
                kind: recovered(
                    getattr(s, kind),
                    getattr(summary["base"][row], kind),
                    getattr(summary[ORACLE][row], kind),
                )
                for kind in ("loss", "accuracy")
            }
            for row, s in rows.items()
            if row in EXPERTS or row == TWO_SKILLS
        }
        for method, rows in summary.items()
    }
    return {
        "seed": seed,
        "threads": torch.get_num_threads(),
        "training": {
            "steps": plan.steps,
            "learning_rate": plan.learning_rate,
            "mixture": plan.mixture,
        },
        "methods": {m: {row: s.to_dict() for row, s in rows.items()} for m, rows in summary.items()},
        "recovered": shares,
        "seconds": watch.seconds,
    }


def _save(out: Path, mixture: Any, tokenizer: Any, results: dict[str, Any]) -> None:
    folder = out / "mixture"
    save_mixture(mixture, folder)
    tokenizer.save_pretrained(folder)
    write_json(out / "results.json", results, indent=1)


def _table(results: dict[str, Any]) -> Table:
    methods: dict[str, dict[str, dict[str, float]]] = results["methods"]
    rows = list(methods["base"])
    table = Table(title="exact match in % (loss in nats per token) on new questions", header_style="bold")
    table.add_column("method")
    for row in rows:
        table.add_column(row, justify="right")
    best = {row: max(methods[m][row]["accuracy"] for m in methods if m != ORACLE) for row in rows}
    for method, cells in methods.items():
        style = "bold cyan" if method == TRAINED else ("dim" if method == ORACLE else "")
        texts = [_cell(c, method != ORACLE and c["accuracy"] == best[row]) for row, c in cells.items()]
        table.add_row(method, *texts, style=style)
    return table


def _cell(cell: dict[str, float], is_best: bool) -> str:
    return f"{'*' if is_best else ''}{100 * cell['accuracy']:.0f} ({cell['loss']:.2f})"


def _verdict(results: dict[str, Any]) -> str:
    methods, shares = results["methods"], results["recovered"]
    lines = []
    for method in (GATELESS, FITTED, TRAINED):
        weakest = min(EXPERTS, key=lambda row: shares[method][row]["accuracy"])
        retained = methods[method][BASE_SKILLS]["accuracy"] / methods["base"][BASE_SKILLS]["accuracy"]
        unseen = methods["base"][UNSEEN_SKILLS]["accuracy"] - methods[method][UNSEEN_SKILLS]["accuracy"]
        least, two = shares[method][weakest]["accuracy"], shares[method][TWO_SKILLS]["accuracy"]
        lines.append(
            f"{method}: recovers at least {100 * least:.0f} % of the oracle's gain over the base (weakest: "
            f"{weakest}), {100 * two:.0f} % in texts of two skills; keeps {100 * retained:.0f} % of the "
            f"base's skills; loses {100 * unseen:.1f} points on unseen skills"
        )
    return "\n".join(lines)
