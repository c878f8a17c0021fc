"""Running a bake-off: every method once per seed, except for scores that already exist on disk."""

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
from ...io.json_files import write_json
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
    write_record,
)
from .report import report
from .settings import Settings
from .texts import MARKED, RUNNING, Texts, count_tokens, load_texts

LOG_WIDTH = 200
"""Width of the console in characters where output goes to a log and not to a terminal."""
PACKAGES = ("peft-moe", "peft", "transformers", "trl", "torch")
"""Packages whose versions each score file names."""


class Runner:
    """One run of a bake-off.

    Args:
        settings: what to compare, on which texts.
        out: folder for scores and results.
        console: target of the progress lines.
    """

    def __init__(self, settings: Settings, out: Path, console: Console) -> None:
        self.settings, self.out, self.console = settings, out, console
        self.tokenizer: Any = AutoTokenizer.from_pretrained(settings.base)
        self.texts: Texts = load_texts(settings)
        self.fingerprints = Fingerprints(settings, self.texts)
        self.builder = MethodBuilder(settings, self.texts, self.tokenizer, out / "trainer")
        self.tokens = count_tokens(self.texts.rows, self.tokenizer, settings.score.max_length)
        self.outcome = Outcome([], {}, {}, [], 0)

    def run(self, methods: Sequence[Method], is_selected: Callable[[str], bool]) -> Outcome:
        """Score the references and all selected methods.

        Args:
            methods: the table of methods.
            is_selected: whether to run the method of that name. Of the others, valid scores on disk are
                used. References always run.
        """
        methods = [*references(self.settings.experts), *methods]
        for number, method in enumerate(methods, start=1):
            selected = method.kind in ("base", "expert") or is_selected(method.name)
            self._run_method(method, f"[{number}/{len(methods)}]", selected)
        return self.outcome

    def _run_method(self, method: Method, progress: str, selected: bool) -> None:
        reason = self._skip_reason(method)
        if reason is not None:
            if selected:
                self._log(progress, method.name, f"skipped: {reason}", "yellow")
                self.outcome.notes[method.name] = f"skipped: {reason}"
            return
        records = []
        for seed in self.settings.seeds if method.varies else (0,):
            path, fingerprint = record_path(self.out, method, seed), self.fingerprints.of(method, seed)
            record = read_record(path, fingerprint)
            title = f"{method.name}, seed {seed}" if method.varies else method.name
            if record is not None:
                self.outcome.reused += 1
                self._log(progress, title, "reused", "cyan")
            elif selected:
                record = self._try_to_score(method, seed, fingerprint, progress, title)
                if record is None:
                    break
                write_record(path, record, {name: version(name) for name in PACKAGES})
            if record is not None:
                records.append(record)
        if records:
            self.outcome.methods.append(method)
            self.outcome.records[method.name] = records

    def _skip_reason(self, method: Method) -> str | None:
        if method.own_budget and self.settings.width.steps == 0:
            return "set width.steps to the sum of the experts' own steps"
        return unsupported_reason(method)

    def _try_to_score(
        self, method: Method, seed: int, fingerprint: str, progress: str, title: str
    ) -> Record | None:
        start = time.perf_counter()
        try:
            with self.console.status(f"{progress} {title} …"):
                record = self._score(method, seed, fingerprint)
        except Exception as error:  # one failing method must not end a run of many hours
            self._note_failure(method, error, progress, title)
            return None
        self._log(progress, title, f"{time.perf_counter() - start:.0f} s", "green")
        return record

    def _note_failure(self, method: Method, error: Exception, progress: str, title: str) -> None:
        if method.kind in ("base", "expert"):
            raise error  # without base and experts there is nothing to compare with
        refused = isinstance(error, PeftMoeError) or method.kind in ("merge", "arrow", "xlora")
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        label = "not possible" if refused else "failed"
        self.outcome.notes[method.name] = f"{label}: {reason}"
        self.out.joinpath("failures").mkdir(parents=True, exist_ok=True)
        trace = self.out / "failures" / f"{method.file_stem}.txt"
        trace.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        if not refused:
            self.outcome.failed.append(method.name)
        self._log(progress, title, f"{label}: {reason} ({trace})", "yellow" if refused else "red")

    def _score(self, method: Method, seed: int, fingerprint: str) -> Record:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, cost = self.builder.build(method, seed)
            start = time.perf_counter()
            scores, tokens = self._score_rows(model)
        cost.tokens_per_second = tokens / (time.perf_counter() - start)
        del model
        gc.collect()
        return Record(method.name, seed, fingerprint, cost, scores)

    def _score_rows(self, model: nn.Module) -> tuple[Scores, int]:
        """Return the scores of all rows, and the number of tokens read for them."""
        plan, tokens = self.settings.score, 0
        scores: Scores = {}
        for row in self.texts.rows:
            if row.name == RUNNING and not _is_mixture(model):
                # Only a mixture reads where turns begin; other models score alike with and without marks.
                scores[RUNNING] = [turns[1:] for turns in scores[MARKED]]
                continue
            texts = score_texts(
                model,
                self.tokenizer,
                row.texts,
                batch_size=plan.batch_size,
                max_length=plan.max_length,
                turns_marked=row.marked,
            )
            scores[row.name] = texts if row.marked else [turns[1:] for turns in texts]
            tokens += self.tokens[row.name]
        return scores, tokens

    def _log(self, progress: str, title: str, text: str, style: str) -> None:
        line = Text.assemble((progress, "dim"), f" {title} ", (text, style))
        self.console.print(line, soft_wrap=True)


def _is_mixture(model: nn.Module) -> bool:
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
    """Compare base, experts, mixtures, merges and PEFT's methods, and write the results to a folder.

    Args:
        settings: what to compare, on which texts.
        out: folder for ``scores/``, ``results.json``, ``results.csv``, ``results.png`` and ``report.txt``.
        only: patterns (``context*``) of methods to run. Of other methods, valid scores on disk are shown.
        skip: patterns of methods not to run.
        methods_file: YAML file that extends or overrides the built-in table of methods.
        console: target of progress and tables.

    Returns:
        The content of ``results.json``.

    Raises:
        PeftMoeError: a setting, a file or a pattern is invalid.
    """
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, LOG_WIDTH)
    # transformers does not annotate its logging functions.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    methods = read_methods(methods_file)
    names = [method.name for method in methods]
    for pattern in (*only, *skip):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise PeftMoeError(f"{pattern!r} matches no method; there are {names}")

    def is_selected(name: str) -> bool:
        included = not only or any(fnmatchcase(name, pattern) for pattern in only)
        return included and not any(fnmatchcase(name, pattern) for pattern in skip)

    runner = Runner(settings, out, console)
    outcome = runner.run(methods, is_selected)
    results = report(settings, runner.texts.rows, outcome, out, console)
    results["settings"] = json.loads(json.dumps(asdict(settings), default=str))
    write_json(out / "results.json", results, indent=1)
    return results
