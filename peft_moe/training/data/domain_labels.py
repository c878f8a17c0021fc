"""Domain labels: each sample's ``domain`` on its way from the dataset to the losses that need it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import PeftMoeError, near_matches
from ...routers.losses import LOSSES, active_losses
from ...tuner.config.domains import UNKNOWN, domain_columns
from ...tuner.config.mixture import MoLoraConfig

DOMAIN = "domain"
TURN_LENGTHS = "turn_lengths"
COLUMNS = (DOMAIN, TURN_LENGTHS)
"""Columns of a dataset that the trainer's own collator does not know."""
DOMAIN_INDEX = "domain_index"
"""The key of a batch that holds the samples' router columns."""


class DomainCollator:
    """Wraps a data collator, which drops unknown columns, and adds the domains to the batch as indices.

    The ``domain`` of a sample is one name, or a list with one name per turn. With a list, ``turn_lengths``
    has the number of tokens of each turn.
    """

    def __init__(
        self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], config: MoLoraConfig
    ) -> None:
        self.collator, self.config = collator, config
        self.column = domain_columns(config)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the wrapped collator's batch, with ``domain_index`` if samples have a domain.

        The index is long [B], or [B, T] if a sample has several domains; padding has -1 (unknown).
        """
        labelled = any(DOMAIN in example for example in examples)
        domains = [example.get(DOMAIN) for example in examples]
        batch = self.collator([{k: v for k, v in e.items() if k not in COLUMNS} for e in examples])
        if any(isinstance(domain, list) for domain in domains):
            batch[DOMAIN_INDEX] = self._per_token(examples, batch)
        elif labelled:
            batch[DOMAIN_INDEX] = torch.tensor([self.column(domain) for domain in domains])
        return batch

    def _per_token(self, examples: list[dict[str, Any]], batch: dict[str, Any]) -> Tensor:
        real_BT = batch["attention_mask"].bool()
        if len(real_BT) != len(examples):
            raise PeftMoeError(
                "a list of domains is for a single text; a pair of answers has one domain for both"
            )
        index_BT = torch.full(real_BT.shape, UNKNOWN)
        for row, example in enumerate(examples):
            real = int(real_BT[row].sum())
            names = example.get(DOMAIN)
            turns = names if isinstance(names, list) else [names]
            lengths = torch.tensor(example[TURN_LENGTHS] if isinstance(names, list) else [real])
            if len(turns) != len(lengths) or int(lengths.sum()) != real:
                raise PeftMoeError(
                    f"a sample of {real} tokens has domain={names!r} and turn_lengths={lengths.tolist()}; "
                    "give one length for each domain, which add up to the sample's tokens"
                )
            columns = torch.tensor([self.column(name) for name in turns])
            index_BT[row, real_BT[row]] = columns.repeat_interleave(lengths)
        return index_BT


def per_row_domains(inputs: dict[str, Any]) -> Tensor | None:
    """Return the batch's ``domain_index`` for each of its rows, or None without one.

    Trainers of pairs stack the chosen answers, then the rejected answers to the same prompts.
    """
    domains: Tensor | None = inputs.get(DOMAIN_INDEX)
    ids = inputs.get("input_ids")
    if domains is None or ids is None or domains.dim() != 1 or len(ids) != 2 * len(domains):
        return domains
    return domains.repeat(2)


def needs_domains(config: MoLoraConfig, has_teacher: bool) -> str | None:
    """Return the config field, as ``name=value``, that needs each sample's domain; None if there is none."""
    for name in active_losses(config):
        if LOSSES[name].needs_domains:
            return LOSSES[name].describe(config)
    if config.distillation_coef != 0 and not has_teacher:
        return f"distillation_coef={config.distillation_coef}"
    return None


def check_domains(dataset: Any, config: MoLoraConfig, args: Any, *, has_teacher: bool = False) -> None:
    """Check that losses that need the samples' domains get them.

    Args:
        dataset: the trainer's prepared dataset; None and streams of unknown columns pass.
        config: the mixture's.
        args: the trainer's arguments.
        has_teacher: whether the trainer has a teacher, so that distillation needs no domain.

    Raises:
        PeftMoeError: samples are packed, there is no column ``domain``, or none of its values names an
            expert.
    """
    field = needs_domains(config, has_teacher)
    if field is None or dataset is None:
        return
    if getattr(args, "packing", False) or getattr(args, "padding_free", False):
        raise PeftMoeError(
            f"{field} cannot distinguish the domains of packed samples; set packing=False and "
            "padding_free=False"
        )
    columns = getattr(dataset, "column_names", None)
    if columns is None:
        return
    if DOMAIN not in columns:
        raise PeftMoeError(
            f"{field} needs a `domain` column that names each sample's expert{_or_a_teacher(field)}; the "
            f"dataset has {sorted(columns)}"
        )
    if len(dataset):
        _check_names(_names(dataset), config)


def refuse_unlabelled(config: MoLoraConfig, has_teacher: bool) -> None:
    """Refuse a training batch without domains, which shows only here if the dataset is a stream.

    Raises:
        PeftMoeError: a loss needs the domains.
    """
    field = needs_domains(config, has_teacher)
    if field is not None:
        raise PeftMoeError(
            f"{field} needs a `domain` for each sample{_or_a_teacher(field)}, and this batch has none; add "
            "the column, and keep it in data_collator"
        )


def _or_a_teacher(field: str) -> str:
    return ", or a teacher (teacher=… of the trainer)" if field.startswith("distillation") else ""


def _names(dataset: Any) -> list[Any]:
    """Return the distinct domains of a dataset, in order of appearance."""
    names: dict[Any, None] = {}
    for domain in dataset[DOMAIN]:
        names.update(dict.fromkeys(domain if isinstance(domain, list) else [domain]))
    return list(names)


def _check_names(domains: list[Any], config: MoLoraConfig) -> None:
    missing = [name for name in config.routed_names if name not in domains]
    if len(missing) == len(config.routed_names):
        example = next((domain for domain in domains if domain is not None), None)
        raise PeftMoeError(
            f"no `domain` of the dataset names an expert; one is {example!r}, the experts are {missing}."
            f"{near_matches(str(example), missing)}"
        )
    if missing and config.router_label_loss_coef != 0:
        warnings.warn(
            f"experts without a sample of their domain: {missing}; the label loss teaches the router to "
            "avoid them",
            stacklevel=4,
        )
