"""Carrying each sample's ``domain`` from the dataset to the routers' label loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..config import MoLoraConfig
from ..domains import domain_columns

DOMAIN = "domain"
DOMAIN_INDEX = "domain_index"


class DomainCollator:
    """Wraps a data collator that drops unknown columns, and keeps the domain as an index."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], config: MoLoraConfig) -> None:
        self.collator = collator
        self.column = domain_columns(config)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The wrapped collator's batch, plus ``domain_index``, long [B], where samples have a domain."""
        domains = [example.get(DOMAIN) for example in examples]
        batch = self.collator([{k: v for k, v in e.items() if k != DOMAIN} for e in examples])
        if any(domain is not None for domain in domains):
            batch[DOMAIN_INDEX] = torch.tensor([self.column(domain) for domain in domains])
        return batch
