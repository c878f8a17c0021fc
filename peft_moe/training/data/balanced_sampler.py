"""Balanced sampling: steps and batches with equal shares of all domains, whatever their sizes in the data.

This concerns the order of training samples. Load balancing of experts is in ``trainers/load_balancing.py``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import Sampler

from ...errors import PeftMoeError
from .domain_labels import DOMAIN


class BalancedSampler(Sampler[int]):
    """Draws rows in groups that contain each domain once, in random order.

    A step over all its batches and processes contains equal shares of all domains, and so does a batch whose
    size is a multiple of the number of domains. In an epoch each row of the largest domain comes at least
    once; smaller domains repeat their rows in another order. The order depends on ``seed`` and the epoch
    alone, so that all processes agree on it and a resumed run continues it.

    Args:
        domains: the domain of each row.
        step_samples: samples per optimizer step, a multiple of the number of domains. An epoch consists of
            whole steps.
        seed: of the order.
        step: returns the number of optimizer steps done, from which the epoch follows.
    """

    def __init__(
        self, domains: Sequence[str], step_samples: int, seed: int, step: Callable[[], int] = lambda: 0
    ) -> None:
        self.rows: dict[str, list[int]] = {name: [] for name in sorted(set(domains))}
        for row, name in enumerate(domains):
            self.rows[name].append(row)
        largest = max(len(rows) for rows in self.rows.values())
        self.steps = -(-largest * len(self.rows) // step_samples)
        self.step_samples, self.seed, self.step = step_samples, seed, step

    def __len__(self) -> int:
        """Return the number of rows of an epoch."""
        return self.steps * self.step_samples

    def __iter__(self) -> Iterator[int]:
        """Yield the rows of one epoch."""
        rng = random.Random(f"{self.seed} {self.step() // self.steps}")
        count = len(self) // len(self.rows)
        columns = [_repeated(rows, count, rng) for rows in self.rows.values()]
        for group in zip(*columns, strict=True):
            yield from rng.sample(group, len(group))


def _repeated(rows: list[int], count: int, rng: random.Random) -> list[int]:
    drawn: list[int] = []
    while len(drawn) < count:
        drawn += rng.sample(rows, len(rows))
    return drawn[:count]


def balanced_sampler(
    dataset: Any, args: Any, batch_size: int, seed: int, step: Callable[[], int] = lambda: 0
) -> BalancedSampler:
    """Make the sampler of a trainer's dataset.

    Args:
        dataset: the trainer's prepared dataset, with a column ``domain``.
        args: the trainer's arguments.
        batch_size: samples per batch of one process.
        seed: of the order.
        step: see :class:`BalancedSampler`.

    Raises:
        PeftMoeError: the dataset is a stream or has packed samples, a sample has no or several domains, the
            arguments set another order, or a step cannot contain equal shares.
    """
    columns = getattr(dataset, "column_names", None)
    if columns is None or not hasattr(dataset, "__len__"):
        raise PeftMoeError(
            "balanced_domains=True needs a dataset with a length, not a stream; load all of it"
        )
    if DOMAIN not in columns:
        raise PeftMoeError(
            f"balanced_domains=True needs a `domain` column; the dataset has {sorted(columns)}"
        )
    if getattr(args, "packing", False):
        raise PeftMoeError("balanced_domains=True cannot distinguish packed samples; set packing=False")
    order = getattr(args, "train_sampling_strategy", "random")
    if order != "random":
        raise PeftMoeError(
            f"balanced_domains=True has an order of its own, and train_sampling_strategy={order!r} asks for "
            "another; leave one out"
        )
    domains = list(dataset[DOMAIN])
    invalid = next((name for name in domains if not isinstance(name, str)), "")
    if invalid != "" or not domains:
        raise PeftMoeError(
            f"balanced_domains=True needs one name as each sample's domain, and a sample has {invalid!r}; "
            "leave switching_share and domain_randomisation at 0, and fill empty domains"
        )
    split = getattr(getattr(args, "accelerator_config", None), "split_batches", False)
    processes = 1 if split else args.world_size
    accumulation = args.gradient_accumulation_steps
    total, names = batch_size * accumulation * processes, sorted(set(domains))
    if total % len(names):
        raise PeftMoeError(
            f"balanced_domains=True: a step of {batch_size} (batch) × {accumulation} (accumulation) × "
            f"{processes} (processes) = {total} samples cannot hold equal shares of {len(names)} domains "
            f"{names}; make it a multiple of {len(names)}"
        )
    return BalancedSampler(domains, total, seed, step)
