"""Batches with equal shares of every domain, whatever their sizes in the data."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import Sampler

from ...errors import PeftMoeError
from .domain_labels import DOMAIN


class BalancedSampler(Sampler[int]):
    """Draws rows in groups that hold each domain once, in random order.

    A batch of a multiple of the domains holds equal shares; so does a step, over its batches and processes.
    In an epoch every row of the largest domain comes at least once; smaller domains begin anew, in another
    order. The order follows from ``seed`` and the epoch alone, so that all processes agree on it and a
    resumed run goes on in it.

    Args:
        domains: of each row.
        step_samples: of one optimizer step, a multiple of the number of domains; an epoch is whole steps.
        seed: of the order.
        step: says how many optimizer steps are done, which tells the epoch.
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
        """Rows of an epoch."""
        return self.steps * self.step_samples

    def __iter__(self) -> Iterator[int]:
        """One epoch's rows."""
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
    """The sampler of a trainer's dataset.

    Args:
        dataset: prepared, with a column ``domain``.
        args: the trainer's arguments.
        batch_size: of one process's batch.
        seed: of the order.
        step: see :class:`BalancedSampler`.

    Raises:
        PeftMoeError: a stream, packed samples, samples of no or of several domains, another order that was
            asked for, or a step that cannot hold equal shares.
    """
    columns = getattr(dataset, "column_names", None)
    if columns is None or not hasattr(dataset, "__len__"):
        raise PeftMoeError("balanced_domains=True needs a dataset with a length, not a stream; load it whole")
    if DOMAIN not in columns:
        raise PeftMoeError(
            f"balanced_domains=True needs a `domain` column; the dataset has {sorted(columns)}"
        )
    if getattr(args, "packing", False):
        raise PeftMoeError("balanced_domains=True cannot tell packed samples apart; set packing=False")
    order = getattr(args, "train_sampling_strategy", "random")
    if order != "random":
        raise PeftMoeError(
            f"balanced_domains=True has an order of its own, and train_sampling_strategy={order!r} asks for "
            "another; leave one out"
        )
    domains = list(dataset[DOMAIN])
    odd = next((name for name in domains if not isinstance(name, str)), "")
    if odd != "" or not domains:
        raise PeftMoeError(
            f"balanced_domains=True needs one name as each sample's domain, and one is {odd!r}; leave "
            "switching_share and domain_randomisation at 0, and fill empty domains"
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
