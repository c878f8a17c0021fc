"""Data augmentation that makes routers robust: generic samples, random domain labels, domain switches.

A router that is trained on texts of its experts' domains alone sends every text to some expert, trusts wrong
labels, and keeps the decision of a text's beginning when the domain changes. Each augmentation depends on the
data and a seed alone.
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
    """Return as many samples as before, a share of them of domains without an expert (arXiv 2407.01126).

    A kind of sample (generic, or of an expert's domain) with too many samples loses some. A kind with too few
    repeats its samples; their counts differ by one at most.

    Args:
        data: a dataset with a column ``domain``.
        share: share of generic samples, 0 to 1; None returns the data unchanged.
        experts: the domains that have an expert.
        seed: of the draw and of the order.

    Raises:
        PeftMoeError: the share is out of range, or one of the kinds has no sample.
    """
    if share is None:
        return data
    _check_share("generic_share", share)
    rng = random.Random(seed)
    rows = list(range(len(data)))
    rng.shuffle(rows)
    domains = data[DOMAIN]
    num_generic = round(share * len(data))
    chosen = []
    for count, generic in ((num_generic, True), (len(data) - num_generic, False)):
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
    """Give a share of the samples another domain or none: domain randomisation (arXiv 2407.01126).

    The share is exact. Each new domain is drawn uniformly from all other domains and None (unknown).

    Args:
        data: a dataset with a column ``domain``.
        share: 0 to 1; 0 returns the data unchanged.
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
    """Check that random domain labels have their intended effect.

    Raises:
        PeftMoeError: nothing reads the labels, or distillation takes each sample's teacher from them.
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
    """Join pairs of samples of different domains, until a share of the records are pairs.

    Each sample is used once, alone or in a pair. The second prompt of a pair starts a new turn: its tokens
    have no labels, so that a router that decides per prompt decides again there. A router that decides per
    token sees the domain change.

    Args:
        data: a dataset that the trainer has tokenised: ``input_ids``, ``labels``, ``domain``.
        share: 0 to 1; 0 returns the data unchanged.
        seed: of the draw and of the order.
        max_length: largest number of tokens of a pair; None for any.

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
    # n samples with j pairs become n − j records, so that the share is j/(n − j).
    num_pairs = round(share * len(rows) / (1 + share))
    pairs = _pairs(rows, num_pairs, max_length, rng)
    if len(pairs) < num_pairs:
        counts = Counter(str(row[DOMAIN]) for row in rows)
        raise PeftMoeError(
            f"switching_share={share} needs {num_pairs} pairs of samples of different domains within "
            f"max_length={max_length}, but there are {len(pairs)} in {dict(counts)}; lower the share, or "
            "raise max_length"
        )
    paired = {id(row) for pair in pairs for row in pair}
    groups = pairs + [[row] for row in rows if id(row) not in paired]
    rng.shuffle(groups)
    return Dataset.from_list([_joined(group) for group in groups])


def _pairs(
    rows: list[dict[str, Any]], num_pairs: int, max_length: int | None, rng: random.Random
) -> list[list[dict[str, Any]]]:
    waiting: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        waiting.setdefault(row[DOMAIN], []).append(row)
    order = list(waiting)
    pairs: list[list[dict[str, Any]]] = []
    while len(pairs) < num_pairs:
        # Pairing the largest domain with the next largest one gives the most pairs. The shuffle orders
        # domains of equal size anew each time.
        rng.shuffle(order)
        order.sort(key=lambda domain: len(waiting[domain]), reverse=True)
        pair = _fitting(waiting, order, max_length)
        if pair is None:
            break
        rng.shuffle(pair)  # otherwise the larger domain would always come first
        pairs.append(pair)
    return pairs


def _fitting(
    waiting: dict[Any, list[dict[str, Any]]], order: list[Any], max_length: int | None
) -> list[dict[str, Any]] | None:
    """Take the first two samples of different domains that fit ``max_length``; None if there are none."""
    for domain_a in order:
        for i, sample_a in enumerate(waiting[domain_a]):
            for domain_b in order:
                for j, sample_b in enumerate(waiting[domain_b] if domain_b != domain_a else []):
                    length = len(sample_a["input_ids"]) + len(sample_b["input_ids"])
                    if max_length is None or length <= max_length:
                        return [waiting[domain_a].pop(i), waiting[domain_b].pop(j)]
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
