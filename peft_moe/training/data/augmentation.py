"""Training data that make routers robust: generic text, wrong labels, texts that change their domain.

A router that only ever sees whole texts of its experts' domains sends everything to some expert, trusts
its labels, and follows the beginning of a text for ever. All three are exact for a seed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection
from typing import Any

from datasets import Dataset

from ...errors import PeftMoeError
from ...tuner.config.mixture import MoLoraConfig
from .domain_labels import DOMAIN, TURN_LENGTHS, needs_domains


def with_generic_share(data: Dataset, share: float | None, experts: Collection[str], seed: int) -> Dataset:
    """As many samples as before, of which ``share`` are of domains without an expert (arXiv 2407.01126).

    Where a kind has more samples than are wanted, some are left out; where it has fewer, all are repeated
    equally often, up to one time.

    Args:
        data: with a column ``domain``.
        share: 0 to 1; 0 leaves generic samples out, None leaves everything as it is.
        experts: the domains that have one.
        seed: of the draw and of the order.

    Raises:
        PeftMoeError: the share is out of range, or one of the kinds is missing.
    """
    if share is None:
        return data
    _check_share("generic_share", share)
    rng = random.Random(seed)
    rows = list(range(len(data)))
    rng.shuffle(rows)
    domains = data[DOMAIN]
    wanted = round(share * len(data))
    chosen = []
    for count, generic in ((wanted, True), (len(data) - wanted, False)):
        pool = [row for row in rows if (domains[row] not in experts) == generic]
        if count and not pool:
            kind = "without an expert" if generic else "of the experts' domains"
            raise PeftMoeError(
                f"generic_share={share} needs samples {kind}, and the training data have none; they have "
                f"{sorted(set(map(str, domains)))}"
            )
        chosen += (pool * -(-count // max(1, len(pool))))[:count]
    rng.shuffle(chosen)
    return data.select(chosen)


def with_random_domains(data: Dataset, share: float, seed: int) -> Dataset:
    """A share of the samples gets another domain's name, or none: domain randomisation (arXiv 2407.01126).

    The share is met exactly; a new name is drawn evenly from all others and "unknown" (None).

    Args:
        data: with a column ``domain``.
        share: 0 to 1; 0 leaves everything as it is.
        seed: of the draw.

    Raises:
        PeftMoeError: the share is out of range.
    """
    _check_share("domain_randomisation", share)
    if share == 0:
        return data
    rng = random.Random(seed)
    domains = list(data[DOMAIN])
    names: list[str | None] = [*sorted({name for name in domains if name is not None}), None]
    for row in rng.sample(range(len(domains)), round(share * len(domains))):
        domains[row] = rng.choice([name for name in names if name != domains[row]])
    return data.remove_columns(DOMAIN).add_column(DOMAIN, domains)


def check_random_domains(config: MoLoraConfig, share: float) -> None:
    """Whether random labels would do what they are for.

    Raises:
        PeftMoeError: nothing reads the labels, or they say who teaches.
    """
    if share and config.distillation_coef:
        raise PeftMoeError(
            f"domain_randomisation={share} would let the wrong experts teach with "
            f"distillation_coef={config.distillation_coef}; set one of them to 0"
        )
    if share and needs_domains(config, has_teacher=True) is None and config.scorer.reads_hidden:
        raise PeftMoeError(
            f"domain_randomisation={share} has no effect: nothing reads the labels; set "
            "router_label_loss_coef"
        )


def with_switches(data: Dataset, share: float, seed: int, max_length: int | None = None) -> Dataset:
    """Join pairs of samples of different domains, until ``share`` of the samples are such pairs.

    Every sample is used once, alone, first or second. In a pair the second prompt is a turn of its own:
    its labels are ignored as before, so that a router that decides per prompt decides again there, and
    one that decides per token sees the change.

    Args:
        data: tokenised by the trainer: ``input_ids``, ``labels``, ``domain``.
        share: 0 to 1; 0 leaves everything as it is.
        seed: of the draw and of the order.
        max_length: of a pair; None for any.

    Returns:
        Records of ``input_ids``, ``labels``, ``domain`` (one name per turn) and ``turn_lengths``.

    Raises:
        PeftMoeError: the share is out of range, samples are packed, or too few pairs fit ``max_length``.
    """
    _check_share("switching_share", share)
    if share == 0:
        return data
    if "seq_lengths" in data.column_names:
        raise PeftMoeError("switching_share cannot join packed samples; set packing=False")
    rng = random.Random(seed)
    rows = data.select_columns(["input_ids", "labels", DOMAIN]).to_list()
    rng.shuffle(rows)
    # n samples with j pairs become n − j records: j/(n − j) is the share.
    wanted = round(share * len(rows) / (1 + share))
    pairs = _pairs(rows, wanted, max_length, rng)
    if len(pairs) < wanted:
        counts = Counter(str(row[DOMAIN]) for row in rows)
        raise PeftMoeError(
            f"switching_share={share} needs {wanted} pairs of samples of different domains within "
            f"max_length={max_length}, and {len(pairs)} were found in {dict(counts)}; lower the share, or "
            "raise max_length"
        )
    paired = {id(row) for pair in pairs for row in pair}
    groups = pairs + [[row] for row in rows if id(row) not in paired]
    rng.shuffle(groups)
    return Dataset.from_list([_joined(group) for group in groups])


def _pairs(
    rows: list[dict[str, Any]], wanted: int, max_length: int | None, rng: random.Random
) -> list[list[dict[str, Any]]]:
    waiting: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        waiting.setdefault(row[DOMAIN], []).append(row)
    order = list(waiting)
    pairs: list[list[dict[str, Any]]] = []
    while len(pairs) < wanted:
        # The largest domain with the next: whatever can be paired, is. Equal ones in a new order each time.
        rng.shuffle(order)
        order.sort(key=lambda domain: len(waiting[domain]), reverse=True)
        pair = _fitting(waiting, order, max_length)
        if pair is None:
            break
        rng.shuffle(pair)  # else the larger domain would always begin
        pairs.append(pair)
    return pairs


def _fitting(
    waiting: dict[Any, list[dict[str, Any]]], order: list[Any], max_length: int | None
) -> list[dict[str, Any]] | None:
    for first in order:
        for i, one in enumerate(waiting[first]):
            for second in order:
                for j, other in enumerate(waiting[second] if second != first else []):
                    length = len(one["input_ids"]) + len(other["input_ids"])
                    if max_length is None or length <= max_length:
                        return [waiting[first].pop(i), waiting[second].pop(j)]
    return None


def _joined(group: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "input_ids": [token for row in group for token in row["input_ids"]],
        "labels": [label for row in group for label in row["labels"]],
        DOMAIN: [row[DOMAIN] for row in group],
        TURN_LENGTHS: [len(row["input_ids"]) for row in group],
    }


def _check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise PeftMoeError(f"{name}={share} must be a share from 0 to 1")
