"""The paper's claims as differences of losses: held, did not hold, not decidable here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

from .text import NONE, RIGHT, SEEN, UNSEEN, WRONG

MARGIN = 0.02
"""Nats per token, 2 % of the perplexity: what counts as the same level."""
DRAWS = 2000
HELD, FAILED, OPEN = "held", "did not hold", "not decidable here"
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


WIDTH = "Width scaling reaches the sparse mixture's level"
LABELS = "A label in the prompt serves as well as gates that read it"
GENERIC = "Generic data make unseen domains robust"
RANDOM = "Random labels in training make wrong labels less harmful"
SPEED = "Width scaling is faster"

CLAIMS = (
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
    """Seeds with which all of these are finished."""
    found = [{seed for name, seed in cells if name == system} for system in systems]
    return sorted(set.intersection(*found))


def difference(cells: Cells, claim: Claim) -> Estimate:
    """Loss of ``one`` − ``other``, nats per token, with a 95 % interval over sentences and seeds, paired."""
    seeds = seeds_of(cells, claim.one[0], claim.other[0])
    if not seeds:
        return Estimate(math.nan, math.nan, math.nan)
    rng = np.random.default_rng(0)
    apart: list[Array] = []
    for domain in claim.domains:
        count = len(cells[claim.one[0], seeds[0]]["scores"][f"{domain}/{claim.one[1]}"]["nll"])
        counts_DN = draw_texts(count, DRAWS, rng)
        one_DS, other_DS = (
            _losses(cells, told, domain, seeds, counts_DN) for told in (claim.one, claim.other)
        )
        apart.append(one_DS - other_DS)
    return estimate(over_seeds(np.mean(apart, axis=0), draw_seeds(len(seeds), DRAWS, rng)))


def _losses(cells: Cells, told: Told, domain: str, seeds: Sequence[int], counts_DN: Array) -> Array:
    rows = [cells[told[0], seed]["scores"][f"{domain}/{told[1]}"] for seed in seeds]
    return ratio(counts_DN, np.array([r["nll"] for r in rows]), np.array([r["tokens"] for r in rows]))


def chrf_difference(cells: Cells, claim: Claim) -> float:
    """chrF of ``one`` − ``other``, mean over domains and seeds."""
    apart = [
        cells[claim.one[0], seed]["scores"][f"{domain}/{claim.one[1]}"]["chrf"]
        - cells[claim.other[0], seed]["scores"][f"{domain}/{claim.other[1]}"]["chrf"]
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
        found = difference(cells, claim)
        rows.append(
            {
                "group": claim.group, "role": claim.role, "text": claim.text, "one": claim.one,
                "other": claim.other, "domains": claim.domains, "margin": claim.margin,
                "unit": "nats per token", **_rounded(found), "chrf": round(chrf_difference(cells, claim), 2),
                "seeds": len(seeds_of(cells, claim.one[0], claim.other[0])),
                "verdict": verdict(found, claim.margin),
            }
        )  # fmt: skip
    for text, clock in (("reading with known translations", "scoring_s"), ("writing", "translating_s")):
        found = speed_difference(cells, "width", "smoe", clock)
        rows.append(
            {
                "group": SPEED, "role": CLAIM, "text": text, "one": ("width", NONE), "other": ("smoe", NONE),
                "domains": (*SEEN, UNSEEN), "margin": 0.0, "unit": "of the CPU time", **_rounded(found),
                "chrf": None, "seeds": len(seeds_of(cells, "width", "smoe")), "verdict": verdict(found),
            }
        )  # fmt: skip
    return rows


def _rounded(found: Estimate) -> dict[str, float]:
    return {"value": round(found.value, 4), "low": round(found.low, 4), "high": round(found.high, 4)}
