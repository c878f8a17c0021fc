"""Arguments of recipes: TRL's parser over YAML that is read strictly, the mixture, and the data by domain."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from datasets import Dataset
from trl import ModelConfig, TrlParser

from ..errors import PeftMoeError, near_matches
from ..io.strict_yaml import read_yaml
from ..io.text_data import KINDS, Kinds, Source, load_text_dataset, source_name, text_kind
from ..tuner.config.mixture import MoLoraConfig


def recipe_mixture(experts: Mapping[str, str], mixture: Mapping[str, Any], model_args: Any) -> MoLoraConfig:
    """The mixture of a recipe, with an error for each key that would have no effect.

    Args:
        experts: name and adapter of each; ``$VARIABLES`` are expanded.
        mixture: further fields of ``MoLoraConfig``.
        model_args: TRL's ``ModelConfig``.

    Raises:
        PeftMoeError: an unknown field, or one of a LoRA that would be trained.
    """
    check_mixture_fields(mixture)
    for key, value in vars(ModelConfig()).items():
        if key.startswith("lora_") and getattr(model_args, key) != value:
            raise PeftMoeError(f"{key} has no effect: the experts are trained already. Leave it out.")
    paths = {name: os.path.expandvars(path) for name, path in experts.items()}
    return MoLoraConfig(experts=paths, task_type="CAUSAL_LM", **mixture)


def check_mixture_fields(mixture: Mapping[str, Any]) -> None:
    """Refuse keys of a recipe's ``mixture`` that are no fields of ``MoLoraConfig``.

    Raises:
        PeftMoeError: an unknown one, with near matches.
    """
    known = {f.name for f in fields(MoLoraConfig) if f.init} - {"experts", "task_type", "peft_type"}
    for key in mixture:
        if key not in known:
            raise PeftMoeError(f"mixture: {key!r} is no field of MoLoraConfig.{near_matches(key, known)}")


def recipe_data(
    train_files: Mapping[str, Source],
    per_domain: int,
    eval_fraction: float,
    seed: int,
    kinds: Kinds = KINDS,
) -> tuple[Dataset, dict[str, Dataset]]:
    """Training records with a column ``domain``, and held-out records of each domain.

    Args:
        train_files: domain and source, a path or a dict of ``path``, ``name`` and ``split``; ``$VARIABLES``
            are expanded.
        per_domain: records of each at most, drawn with ``seed``.
        eval_fraction: of those, held out.
        seed: of the draw.
        kinds: of records, see :func:`peft_moe.io.text_data.load_text_dataset`.

    Raises:
        PeftMoeError: what the files hold cannot be trained on, or nothing would be left.
    """
    files = {domain: _expanded(source) for domain, source in train_files.items()}
    data = load_text_dataset(files, kinds=kinds).shuffle(seed=seed)
    kind = text_kind(data.column_names, kinds)
    assert kind is not None  # it was loaded as one
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


def by_domain(metrics: Mapping[str, float], domains: Iterable[str], part: str) -> dict[str, float]:
    """``{domain: value}`` of the held-out metric whose name ends in ``part``, where there is one."""
    names = {domain: f"eval_{domain}_{part}" for domain in domains}
    return {domain: round(metrics[name], 4) for domain, name in names.items() if name in metrics}


class StrictTrlParser(TrlParser):  # type: ignore[misc]  # trl is untyped here
    """``TrlParser``, which by itself keeps the last of two experts of one name without a word."""

    def parse_args_and_config(self, args: Iterable[str] | None = None, *more: Any, **named: Any) -> Any:
        """As TRL's own.

        Raises:
            PeftMoeError: the file of ``--config`` is no plain YAML: a key twice, a name that is a truth
                (``no``), with the line.
        """
        given = list(args) if args is not None else sys.argv[1:]
        if "--config" in given[:-1]:
            read_yaml(given[given.index("--config") + 1])
        return super().parse_args_and_config(given, *more, **named)
