"""The paper's claims as differences of losses: held, did not hold, not decidable here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peft_moe.evaluation.bakeoff.statistics import (
    Array,
    Estimate,
    draw_seeds,
    draw_texts,
    estimate,
    over_seeds,
    ratio,
)

from ..papers import HELD, OPEN
from ..papers import NOT as FAILED
from .text import NONE, RIGHT, SEEN, UNSEEN, WRONG

MARGIN = 0.02
"""Nats per token, 2 % of the perplexity: what counts as the same level."""
FASTER = -0.1
"""Of the time: what a shared machine's clock can tell for sure."""
DRAWS = 2000
Cells = Mapping[tuple[str, int], Mapping[str, Any]]
"""(system, seed) → what its score file holds."""
CLAIM, BEYOND, CHECK = "claim", "beyond the paper", "check"
"""What a line is: the paper's claim, one that goes further, or what must hold for claims to mean anything."""
Told = tuple[str, str]
"""A system, and what it is told of the domain."""


@dataclass(frozen=True)
class Claim:
    """``one`` loses less than ``other``, or with a margin: at most so much more; mean over ``domains``."""

    group: str
    text: str
    one: Told
    other: Told
    domains: tuple[str, ...] = SEEN
    margin: float = 0.0
    role: str = CLAIM


BASE = "base"
WIDTH = "Width scaling reaches the sparse mixture's level"
LABELS = "A label in the prompt serves as well as gates that read it"
GENERIC = "Generic data make unseen domains robust"
RANDOM = "Random labels in training make wrong labels less harmful"
SPEED = "Width scaling is faster"

CLAIMS = (
    Claim(WIDTH, "training on the domains lowers their loss at all", ("width", NONE), (BASE, NONE),
          role=CHECK),
    Claim(WIDTH, "at equal total rank", ("width", NONE), ("smoe", NONE), margin=MARGIN),
    Claim(WIDTH, "the same, both with generic pairs", ("width+generic", NONE), ("smoe+generic", NONE),
          margin=MARGIN),
    Claim(WIDTH, "the same, on the unseen domain", ("width+generic", NONE), ("smoe+generic", NONE), (UNSEEN,),
          MARGIN),
    Claim(WIDTH, "at equal active rank", ("active", NONE), ("smoe", NONE), margin=MARGIN, role=BEYOND),
    Claim(WIDTH, "against trained experts behind a trained router, generic pairs in both",
          ("width+generic", NONE), ("routed", NONE), margin=MARGIN, role=BEYOND),
    Claim(LABELS, "right labels, seen domains", ("tags", RIGHT), ("gates", RIGHT), margin=MARGIN),
    Claim(LABELS, "a right label lowers the loss at all", ("tags", RIGHT), ("width+generic", NONE),
          role=CHECK),
    Claim(GENERIC, "one LoRA, unseen domain", ("width+generic", NONE), ("width", NONE), (UNSEEN,)),
    Claim(GENERIC, "sparse mixture, unseen domain", ("smoe+generic", NONE), ("smoe", NONE), (UNSEEN,)),
    Claim(GENERIC, "one LoRA, without harm to seen domains", ("width+generic", NONE), ("width", NONE),
          margin=MARGIN),
    Claim(GENERIC, "sparse mixture, without harm to seen domains", ("smoe+generic", NONE), ("smoe", NONE),
          margin=MARGIN),
    Claim(RANDOM, "wrong names in the prompt do harm", ("tags", RIGHT), ("tags", WRONG), role=CHECK),
    Claim(RANDOM, "wrong labels at gates do harm", ("gates", RIGHT), ("gates", WRONG), role=CHECK),
    Claim(RANDOM, "names in the prompt, wrong ones", ("tags+random", WRONG), ("tags", WRONG)),
    Claim(RANDOM, "gates, wrong labels", ("gates+random", WRONG), ("gates", WRONG)),
    Claim(RANDOM, "names in the prompt, unseen domain under a seen one's", ("tags+random", WRONG),
          ("tags", WRONG), (UNSEEN,)),
    Claim(RANDOM, "gates, unseen domain under a seen one's label", ("gates+random", WRONG), ("gates", WRONG),
          (UNSEEN,)),
    Claim(RANDOM, "names in the prompt, without harm where they are right", ("tags+random", RIGHT),
          ("tags", RIGHT), margin=MARGIN),
    Claim(RANDOM, "gates, without harm where labels are right", ("gates+random", RIGHT), ("gates", RIGHT),
          margin=MARGIN),
)  # fmt: skip


def verdict(found: Estimate, margin: float = 0.0) -> str:
    """Of a claim that a difference is below ``margin``: the whole interval is, or is above it, or neither."""
    if math.isfinite(found.value) and found.high < margin:
        return HELD
    return FAILED if math.isfinite(found.value) and found.low > margin else OPEN


def read_cells(out: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """All finished systems of a run."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "scores").glob("*.json"))]
    return {(one["system"], one["seed"]): one for one in files}


def seeds_of(cells: Cells, *systems: str) -> list[int]:
    """Seeds with which all of these are finished; the base has one, which serves for all."""
    found = [{seed for name, seed in cells if name == system} for system in systems]
    varied = [seeds for system, seeds in zip(systems, found, strict=True) if system != BASE or not seeds]
    return sorted(set.intersection(*(varied or found)))


def row_of(cells: Cells, told: Told, domain: str, seed: int) -> Mapping[str, Any]:
    """One system's scores on one domain."""
    if told[0] == BASE:
        (seed,) = seeds_of(cells, BASE)
    row: Mapping[str, Any] = cells[told[0], seed]["scores"][f"{domain}/{told[1]}"]
    return row


def difference(cells: Cells, claim: Claim) -> Estimate:
    """Loss of ``one`` − ``other``, nats per token, with a 95 % interval over sentences and seeds, paired."""
    seeds = seeds_of(cells, claim.one[0], claim.other[0])
    if not seeds:
        return Estimate(math.nan, math.nan, math.nan)
    rng = np.random.default_rng(0)
    apart: list[Array] = []
    for domain in claim.domains:
        count = len(row_of(cells, claim.one, domain, seeds[0])["nll"])
        counts_DN = draw_texts(count, DRAWS, rng)
        one_DS, other_DS = (
            _losses(cells, told, domain, seeds, counts_DN) for told in (claim.one, claim.other)
        )
        apart.append(one_DS - other_DS)
    return estimate(over_seeds(np.mean(apart, axis=0), draw_seeds(len(seeds), DRAWS, rng)))


def _losses(cells: Cells, told: Told, domain: str, seeds: Sequence[int], counts_DN: Array) -> Array:
    rows = [row_of(cells, told, domain, seed) for seed in seeds]
    return ratio(counts_DN, np.array([r["nll"] for r in rows]), np.array([r["tokens"] for r in rows]))


def chrf_difference(cells: Cells, claim: Claim) -> float:
    """chrF of ``one`` − ``other``, mean over domains and seeds."""
    apart = [
        row_of(cells, claim.one, domain, seed)["chrf"] - row_of(cells, claim.other, domain, seed)["chrf"]
        for seed in seeds_of(cells, claim.one[0], claim.other[0])
        for domain in claim.domains
    ]
    return sum(apart) / len(apart) if apart else math.nan


def speed_difference(cells: Cells, one: str, other: str, clock: str) -> Estimate:
    """By what share ``one`` takes longer than ``other``: the mean over seeds, the least and the most."""
    shares = []
    for seed in seeds_of(cells, one, other):
        spent = [sum(row[clock] for row in cells[name, seed]["scores"].values()) for name in (one, other)]
        shares.append(spent[0] / spent[1] - 1)
    if not shares:
        return Estimate(math.nan, math.nan, math.nan)
    return Estimate(sum(shares) / len(shares), min(shares), max(shares))


def judged(cells: Cells) -> list[dict[str, Any]]:
    """All claims with their figures and what is said of them."""
    rows = []
    for claim in CLAIMS:
        found = _rounded(difference(cells, claim))
        rows.append(
            {
                "group": claim.group, "role": claim.role, "text": claim.text, "one": claim.one,
                "other": claim.other, "domains": claim.domains, "margin": claim.margin,
                "unit": "nats per token", **asdict(found), "chrf": round(chrf_difference(cells, claim), 2),
                "seeds": len(seeds_of(cells, claim.one[0], claim.other[0])),
                "verdict": verdict(found, claim.margin),
            }
        )  # fmt: skip
    for text, clock in (("reading with known translations", "scoring_s"), ("writing", "translating_s")):
        found = _rounded(speed_difference(cells, "width", "smoe", clock))
        rows.append(
            {
                "group": SPEED, "role": CLAIM, "text": text, "one": ("width", NONE), "other": ("smoe", NONE),
                "domains": (*SEEN, UNSEEN), "margin": FASTER, "unit": "of the CPU time", **asdict(found),
                "chrf": None, "seeds": len(seeds_of(cells, "width", "smoe")),
                "verdict": verdict(found, FASTER),
            }
        )  # fmt: skip
    return rows


def _rounded(found: Estimate) -> Estimate:
    # Before it is judged: the verdict is then that of the figures that are kept.
    return Estimate(*(round(value, 4) for value in asdict(found).values()))
