"""Runs a bake-off: every method once per seed, what is on disk already not again."""

from __future__ import annotations

import gc
import json
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from torch import nn
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from ...errors import PeftMoeError
from ...tuner.config.mixture import MoLoraConfig
from ..score import score_texts
from .build import MethodBuilder
from .methods import Method, read_methods, references, unsupported_reason
from .records import (
    Fingerprints,
    Outcome,
    Record,
    Scores,
    read_record,
    record_path,
    write_json,
    write_record,
)
from .report import report
from .settings import Settings
from .texts import MARKED, RUNNING, Texts, count_tokens, load_texts

LOG_WIDTH = 200
"""Characters of a line in a log, where no terminal says how many fit."""
PACKAGES = ("peft-moe", "peft", "transformers", "trl", "torch")


class Runner:
    """One bake-off.

    Args:
        settings: of it.
        out: folder for scores and results.
        console: where progress goes.
    """

    def __init__(self, settings: Settings, out: Path, console: Console) -> None:
        self.settings, self.out, self.console = settings, out, console
        self.tokenizer: Any = AutoTokenizer.from_pretrained(settings.base)
        self.texts: Texts = load_texts(settings)
        self.prints = Fingerprints(settings, self.texts)
        self.builder = MethodBuilder(settings, self.texts, self.tokenizer, out / "trainer")
        self.tokens = count_tokens(self.texts.rows, self.tokenizer, settings.score.max_length)
        self.outcome = Outcome([], {}, {}, [], 0)

    def run(self, methods: Sequence[Method], wanted: Callable[[str], bool]) -> Outcome:
        """Score everybody.

        Args:
            methods: the table.
            wanted: which of them to run; of the others, scores on disk are used if they fit. References
                always run.
        """
        everybody = [*references(self.settings.experts), *methods]
        for number, one in enumerate(everybody, start=1):
            selected = one.kind in ("base", "expert") or wanted(one.name)
            self._one(one, f"[{number}/{len(everybody)}]", selected)
        return self.outcome

    def _one(self, one: Method, place: str, selected: bool) -> None:
        found, note = [], self._excused(one)
        if note is not None:
            if selected:
                self._say(place, one.name, f"skipped: {note}", "yellow")
                self.outcome.notes[one.name] = f"skipped: {note}"
            return
        for seed in self.settings.seeds if one.varies else (0,):
            path, settings = record_path(self.out, one, seed), self.prints.of(one, seed)
            record = read_record(path, settings)
            title = f"{one.name}, seed {seed}" if one.varies else one.name
            if record is not None:
                self.outcome.reused += 1
                self._say(place, title, "reused", "cyan")
            elif selected:
                record = self._attempt(one, seed, settings, place, title)
                if record is None:
                    break
                write_record(path, record, {name: version(name) for name in PACKAGES})
            if record is not None:
                found.append(record)
        if found:
            self.outcome.methods.append(one)
            self.outcome.records[one.name] = found

    def _excused(self, one: Method) -> str | None:
        if one.own_budget and self.settings.width.steps == 0:
            return "set width.steps to the sum of the experts' own steps"
        return unsupported_reason(one)

    def _attempt(self, one: Method, seed: int, settings: str, place: str, title: str) -> Record | None:
        start = time.perf_counter()
        try:
            with self.console.status(f"{place} {title} …"):
                record = self._score(one, seed, settings)
        except Exception as error:  # one method must not end a night's run
            self._note(one, error, place, title)
            return None
        self._say(place, title, f"{time.perf_counter() - start:.0f} s", "green")
        return record

    def _note(self, one: Method, error: Exception, place: str, title: str) -> None:
        ours = one.kind in ("base", "expert")
        refused = isinstance(error, PeftMoeError) or one.kind in ("merge", "arrow", "xlora")
        if ours:
            raise error  # without base and experts there is nothing to compare with
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        word = "not possible" if refused else "failed"
        self.outcome.notes[one.name] = f"{word}: {reason}"
        self.out.joinpath("failures").mkdir(parents=True, exist_ok=True)
        trace = self.out / "failures" / f"{one.file_stem}.txt"
        trace.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        if not refused:
            self.outcome.failed.append(one.name)
        self._say(place, title, f"{word}: {reason} ({trace})", "yellow" if refused else "red")

    def _score(self, one: Method, seed: int, settings: str) -> Record:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, cost = self.builder.build(one, seed)
            start = time.perf_counter()
            scores, read = self._rows(model)
        cost.tokens_per_second = read / (time.perf_counter() - start)
        del model
        gc.collect()
        return Record(one.name, seed, settings, cost, scores)

    def _rows(self, model: nn.Module) -> tuple[Scores, int]:
        plan, read = self.settings.score, 0
        scores: Scores = {}
        for row in self.texts.rows:
            if row.name == RUNNING and not _told_turns(model):
                # Only a mixture's decision per prompt could differ.
                scores[RUNNING] = [turns[1:] for turns in scores[MARKED]]
                continue
            found = score_texts(
                model,
                self.tokenizer,
                row.texts,
                batch_size=plan.batch_size,
                max_length=plan.max_length,
                turns_marked=row.marked,
            )
            scores[row.name] = found if row.marked else [turns[1:] for turns in found]
            read += self.tokens[row.name]
        return scores, read

    def _say(self, place: str, title: str, text: str, style: str) -> None:
        line = Text.assemble((place, "dim"), f" {title} ", (text, style))
        self.console.print(line, soft_wrap=True)


def _told_turns(model: nn.Module) -> bool:
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    return any(isinstance(config, MoLoraConfig) for config in configs.values())


def run_bakeoff(
    settings: Settings,
    out: Path,
    *,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    methods_file: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Compare base, experts, mixtures, merges and peers, and write the results to a folder.

    Args:
        settings: of the bake-off.
        out: gets ``scores/``, ``results.json``, ``results.csv``, ``results.png`` and ``report.txt``.
        only: patterns (``context*``) of methods to run; of others, fitting scores on disk are shown too.
        skip: patterns of methods not to run.
        methods_file: YAML laid over the table of methods.
        console: where to print.

    Returns:
        What ``results.json`` holds.

    Raises:
        PeftMoeError: settings, files or patterns that cannot work.
    """
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, LOG_WIDTH)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    methods = read_methods(methods_file)
    for pattern in (*only, *skip):
        if not any(fnmatchcase(one.name, pattern) for one in methods):
            raise PeftMoeError(f"{pattern!r} matches no method; there are {[one.name for one in methods]}")

    def wanted(name: str) -> bool:
        chosen = not only or any(fnmatchcase(name, pattern) for pattern in only)
        return chosen and not any(fnmatchcase(name, pattern) for pattern in skip)

    runner = Runner(settings, out, console)
    outcome = runner.run(methods, wanted)
    results = report(settings, runner.texts.rows, outcome, out, console)
    results["settings"] = json.loads(json.dumps(asdict(settings), default=str))
    write_json(out / "results.json", results, indent=1)
    return results
