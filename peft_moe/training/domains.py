"""Carrying each sample's ``domain`` from the dataset to the routers' label loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from ..config import MoLoraConfig
from ..domains import domain_columns
from ..errors import PeftMoeError, near_matches

DOMAIN = "domain"
DOMAIN_INDEX = "domain_index"


class DomainCollator:
    """Wraps a data collator that drops unknown columns, and keeps the domain as an index."""

    def __init__(
        self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], config: MoLoraConfig
    ) -> None:
        self.collator = collator
        self.column = domain_columns(config)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The wrapped collator's batch, plus ``domain_index``, long [B], where samples have a domain."""
        labelled = any(DOMAIN in example for example in examples)
        domains = [example.get(DOMAIN) for example in examples]
        batch = self.collator([{k: v for k, v in e.items() if k != DOMAIN} for e in examples])
        if labelled:
            batch[DOMAIN_INDEX] = torch.tensor([self.column(domain) for domain in domains])
        return batch


def check_domains(dataset: Any, config: MoLoraConfig, args: Any) -> None:
    """Whether the label loss, if the config asks for it, can find each sample's domain.

    Args:
        dataset: the trainer's, prepared; None and streams of unknown columns pass.
        config: the mixture's.
        args: the trainer's arguments.

    Raises:
        PeftMoeError: samples are packed, there is no column ``domain``, or no value in it names an expert.
    """
    coefficient = config.router_label_loss_coef
    if coefficient == 0 or dataset is None:
        return
    if getattr(args, "packing", False) or getattr(args, "padding_free", False):
        raise PeftMoeError(
            f"router_label_loss_coef={coefficient} cannot tell the domains of packed samples apart; set "
            "packing=False and padding_free=False"
        )
    columns = getattr(dataset, "column_names", None)
    if columns is None:
        return
    if DOMAIN not in columns:
        raise PeftMoeError(
            f"router_label_loss_coef={coefficient} needs a `domain` column that names each sample's expert; "
            f"the dataset has {sorted(columns)}"
        )
    if hasattr(dataset, "unique") and len(dataset):
        _check_names(dataset.unique(DOMAIN), config)


def _check_names(domains: list[Any], config: MoLoraConfig) -> None:
    missing = [name for name in config.expert_names if name not in domains]
    if len(missing) == config.num_experts:
        other = next((domain for domain in domains if domain is not None), None)
        raise PeftMoeError(
            f"no `domain` of the dataset names an expert, such as {other!r}."
            f"{near_matches(str(other), missing)}"
        )
    if missing:
        warnings.warn(
            f"experts without a sample of their domain: {missing}; the label loss teaches the router to "
            "avoid them",
            stacklevel=4,
        )
