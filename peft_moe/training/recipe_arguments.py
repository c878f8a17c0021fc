"""What recipes make of their arguments: a strict YAML parser, the mixture, and the data by domain."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from datasets import Dataset
from trl import ModelConfig, TrlParser  # type: ignore[attr-defined]  # trl exports it lazily

from ..errors import PeftMoeError, near_matches
from ..io.strict_yaml import read_yaml
from ..io.text_data import KINDS, Kinds, Source, load_text_dataset, source_name, text_kind
from ..tuner.config.mixture import MoLoraConfig


def recipe_mixture(experts: Mapping[str, str], mixture: Mapping[str, Any], model_args: Any) -> MoLoraConfig:
    """Build the mixture's config of a recipe, and refuse keys that would have no effect.

    Args:
        experts: adapter of each expert, by name; ``$VARIABLES`` are expanded.
        mixture: further fields of ``MoLoraConfig``.
        model_args: TRL's ``ModelConfig``.

    Raises:
        PeftMoeError: a field is unknown, or sets TRL's own LoRA (``lora_r``, …).
    """
    check_mixture_fields(mixture)
    for key, value in vars(ModelConfig()).items():
        if key.startswith("lora_") and getattr(model_args, key) != value:
            raise PeftMoeError(f"{key} has no effect: the experts are trained already. Leave it out.")
    paths = {name: os.path.expandvars(path) for name, path in experts.items()}
    return MoLoraConfig(experts=paths, task_type="CAUSAL_LM", **mixture)


def check_mixture_fields(mixture: Mapping[str, Any]) -> None:
    """Refuse keys of a recipe's ``mixture`` that are not fields of ``MoLoraConfig``.

    Raises:
        PeftMoeError: a key is unknown; the message names near matches.
    """
    names = {f.name for f in fields(MoLoraConfig) if f.init} - {"experts", "task_type", "peft_type"}
    for key in mixture:
        if key not in names:
            raise PeftMoeError(f"mixture: {key!r} is not a field of MoLoraConfig.{near_matches(key, names)}")


def recipe_data(
    train_files: Mapping[str, Source],
    per_domain: int,
    eval_fraction: float,
    seed: int,
    kinds: Kinds = KINDS,
) -> tuple[Dataset, dict[str, Dataset]]:
    """Load training records with a column ``domain``, and held-out records of each domain.

    Args:
        train_files: source of each domain: a path, or a dict of ``path``, ``name`` and ``split``;
            ``$VARIABLES`` are expanded.
        per_domain: largest number of records per domain, drawn with ``seed``.
        eval_fraction: share of these records that is held out, one record at least.
        seed: of the draw.
        kinds: accepted kinds of records, see :func:`peft_moe.io.text_data.load_text_dataset`.

    Returns:
        The training records of all domains, and the held-out records by domain.

    Raises:
        PeftMoeError: a file cannot be trained on, or a domain has no record left to train on.
    """
    files = {domain: _expanded(source) for domain, source in train_files.items()}
    data = load_text_dataset(files, kinds=kinds).shuffle(seed=seed)
    kind = text_kind(data.column_names, kinds)
    assert kind is not None  # load_text_dataset has checked it
    data = data.select_columns([*kinds[kind], "domain"])
    domains, train, heldout = data["domain"], [], {}
    for domain, source in files.items():
        rows = [row for row, name in enumerate(domains) if name == domain][:per_domain]
        count = max(1, int(len(rows) * eval_fraction))
        if len(rows) <= count:
            raise PeftMoeError(
                f"{source_name(source)}: {len(rows)} records with eval_fraction={eval_fraction} leave "
                "none to train on."
            )
        heldout[domain] = data.select(rows[:count])
        train += rows[count:]
    return data.select(train), heldout


def _expanded(source: Source) -> Source:
    if isinstance(source, Mapping):
        return {k: os.path.expandvars(v) if isinstance(v, str) else v for k, v in source.items()}
    return os.path.expandvars(source)


def by_domain(metrics: Mapping[str, float], domains: Iterable[str], metric: str) -> dict[str, float]:
    """Return a held-out metric by domain, rounded, for the domains that have it.

    Args:
        metrics: the trainer's metrics.
        domains: names of the evaluation datasets.
        metric: the metric's name without prefix, such as "loss".
    """
    names = {domain: f"eval_{domain}_{metric}" for domain in domains}
    return {domain: round(metrics[name], 4) for domain, name in names.items() if name in metrics}


class StrictTrlParser(TrlParser):
    """TRL's ``TrlParser`` with a strict YAML reader; TRL's own silently keeps the last of two equal keys."""

    def parse_args_and_config(self, args: Iterable[str] | None = None, *more: Any, **named: Any) -> Any:
        """Parse as TRL's own method does, after a check of the file of ``--config``.

        Raises:
            PeftMoeError: the file has a key twice, or a name that YAML reads as a boolean (``no``); the
                message names the line.
        """
        arguments = list(args) if args is not None else sys.argv[1:]
        if "--config" in arguments[:-1]:
            read_yaml(arguments[arguments.index("--config") + 1])
        return super().parse_args_and_config(arguments, *more, **named)
