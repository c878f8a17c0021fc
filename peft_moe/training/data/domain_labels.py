"""Carrying each sample's ``domain`` from the dataset to the losses that are about it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import PeftMoeError, near_matches
from ...routers.losses import NEED_DOMAINS
from ...tuner.config.domains import UNKNOWN, domain_columns
from ...tuner.config.mixture import MoLoraConfig

DOMAIN = "domain"
TURN_LENGTHS = "turn_lengths"
OURS = (DOMAIN, TURN_LENGTHS)
DOMAIN_INDEX = "domain_index"


class DomainCollator:
    """Wraps a data collator that drops unknown columns, and keeps the domain as an index.

    A sample has one ``domain``, a name, or one for each of its turns: a list of names, with the turns'
    numbers of tokens in ``turn_lengths``.
    """

    def __init__(
        self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], config: MoLoraConfig
    ) -> None:
        self.collator, self.config = collator, config
        self.column = domain_columns(config)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The wrapped collator's batch, plus ``domain_index`` where samples have a domain.

        It is long [B], or [B, T] where a sample has several domains; padding is unknown (-1).
        """
        labelled = any(DOMAIN in example for example in examples)
        domains = [example.get(DOMAIN) for example in examples]
        batch = self.collator([{k: v for k, v in e.items() if k not in OURS} for e in examples])
        if any(isinstance(domain, list) for domain in domains):
            batch[DOMAIN_INDEX] = self._per_token(examples, batch)
        elif labelled:
            batch[DOMAIN_INDEX] = torch.tensor([self.column(domain) for domain in domains])
        return batch

    def _per_token(self, examples: list[dict[str, Any]], batch: dict[str, Any]) -> Tensor:
        real_BT = batch["attention_mask"].bool()
        if len(real_BT) != len(examples):
            raise PeftMoeError("a list of domains is for one text; a pair of answers has one domain for both")
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
    """The batch's ``domain_index``, for each of its rows; None without one.

    Trainers of pairs stack both halves: all chosen answers, then all rejected ones to the same prompts.
    """
    domains: Tensor | None = inputs.get(DOMAIN_INDEX)
    ids = inputs.get("input_ids")
    if domains is None or ids is None or domains.dim() != 1 or len(ids) != 2 * len(domains):
        return domains
    return domains.repeat(2)


def needs_domains(config: MoLoraConfig, has_teacher: bool) -> str | None:
    """The field, as ``name=value``, that cannot do without each sample's domain; None if there is none."""
    names = [name for name in NEED_DOMAINS if getattr(config, name) != 0]
    if config.distillation_coef != 0 and not has_teacher:
        names.append("distillation_coef")
    return f"{names[0]}={getattr(config, names[0])}" if names else None


def check_domains(dataset: Any, config: MoLoraConfig, args: Any, *, has_teacher: bool = False) -> None:
    """Whether losses about the samples' domains, if the config asks for any, can find them.

    Args:
        dataset: the trainer's, prepared; None and streams of unknown columns pass.
        config: the mixture's.
        args: the trainer's arguments.
        has_teacher: whether the trainer was given a teacher, so that distillation needs no domain.

    Raises:
        PeftMoeError: samples are packed, there is no column ``domain``, or no value in it names an expert.
    """
    field = needs_domains(config, has_teacher)
    if field is None or dataset is None:
        return
    if getattr(args, "packing", False) or getattr(args, "padding_free", False):
        raise PeftMoeError(
            f"{field} cannot tell the domains of packed samples apart; set packing=False and "
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
    """A training batch came without domains: streams show only then that they have none.

    Raises:
        PeftMoeError: a loss needs them.
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
    found: dict[Any, None] = {}
    for domain in dataset[DOMAIN]:
        found.update(dict.fromkeys(domain if isinstance(domain, list) else [domain]))
    return list(found)


def _check_names(domains: list[Any], config: MoLoraConfig) -> None:
    missing = [name for name in config.routed_names if name not in domains]
    if len(missing) == len(config.routed_names):
        other = next((domain for domain in domains if domain is not None), None)
        raise PeftMoeError(
            f"no `domain` of the dataset names an expert, such as {other!r}."
            f"{near_matches(str(other), missing)}"
        )
    if missing and config.router_label_loss_coef != 0:
        warnings.warn(
            f"experts without a sample of their domain: {missing}; the label loss teaches the router to "
            "avoid them",
            stacklevel=4,
        )
