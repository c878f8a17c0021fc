"""Multi-domain translation: how pairs are split and labels made wrong, and what makes a claim hold."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.nmt.claims import (
    BEYOND,
    CHECK,
    CLAIM,
    CLAIMS,
    FAILED,
    HELD,
    OPEN,
    Claim,
    difference,
    speed_difference,
    verdict,
)
from benchmarks.nmt.page import RESULTS, page, plainly, spread
from benchmarks.nmt.plan import SYSTEMS
from benchmarks.nmt.text import (
    GENERIC,
    NONE,
    RIGHT,
    SEEN,
    UNSEEN,
    WRONG,
    labels_of,
    prompt,
    read_lines,
    write_data,
    write_mix,
    wrong_label,
)
from peft_moe import PeftMoeError
from peft_moe.evaluation.bakeoff.statistics import Estimate

SIZES = {"it": 40, "law": 24, "shell": 10}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Sets of invented pairs, every fifth of them long."""
    for domain, size in SIZES.items():
        folder = tmp_path / "source" / "nmt" / "en-fr" / domain
        folder.mkdir(parents=True)
        for split in ("train", "test"):
            rows = [
                {"src": f"{domain} {split} {i} " + "long " * (100 * (i % 5 == 0)), "tgt": f"texte {i}"}
                for i in range(size)
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return tmp_path / "source"


# -- text --------------------------------------------------------------------------------------------


def test_a_domains_own_pairs_are_not_generic_and_the_unseen_ones_half_is_nobodys(
    source: Path, tmp_path: Path
) -> None:
    counts = write_data(source, tmp_path, max_chars=100, tests=6)
    files = {name: read_lines(tmp_path / f"{name}.jsonl") for name in counts}
    assert {name: len(rows) for name, rows in files.items()} == counts
    assert counts["base"] == sum(size // 2 for size in SIZES.values())
    generic = {row["src"] for row in files[GENERIC]}
    assert generic == {row["src"] for row in files["base"] if "long" not in row["src"]}
    for domain in SEEN:
        own = {row["src"] for row in files[domain]}
        assert own
        assert not own & {row["src"] for row in files["base"]}
    everywhere = {row["src"] for name in ("base", GENERIC, *SEEN) for row in files[name]}
    assert sum(src.startswith(UNSEEN) for src in everywhere) == SIZES[UNSEEN] // 2
    assert Counter(row["domain"] for row in files["test"]) == dict.fromkeys((*SEEN, UNSEEN), 6)
    assert not any("train" in row["src"] or "long" in row["src"] for row in files["test"])


def test_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(PeftMoeError, match=r"it.train\.jsonl is missing; set PEFT_MOE_DATA"):
        write_data(tmp_path, tmp_path, max_chars=100, tests=6)


def test_wrong_labels_are_never_right_and_unseen_sentences_get_each_in_turn() -> None:
    assert [wrong_label(domain, number) for domain in SEEN for number in (0, 1)] == ["law", "law", "it", "it"]
    assert labels_of(UNSEEN, WRONG, 4) == ["it", "law", "it", "law"]
    assert labels_of("it", RIGHT, 2) == ["it", "it"]
    assert labels_of("it", NONE, 2) == [None, None]


def test_only_seen_domains_have_a_name_in_the_prompt() -> None:
    assert prompt("Stop", tagged=True, label="law") == "<law> en: Stop\nfr:"
    unknown = {prompt("Stop", tagged=True, label=label) for label in (None, UNSEEN, GENERIC)}
    assert unknown == {"<any> en: Stop\nfr:"}
    assert prompt("Stop", label="law") == "en: Stop\nfr:"


@pytest.mark.parametrize(("generic", "randomised"), [(0.0, 0.0), (0.5, 0.0), (0.25, 0.5)])
def test_a_mix_has_these_shares_and_its_wrong_labels_are_in_the_prompts(
    source: Path, tmp_path: Path, generic: float, randomised: float
) -> None:
    write_data(source, tmp_path, max_chars=100, tests=6)
    write_mix(tmp_path, tmp_path / "mix.jsonl", generic, randomised, True, seed=3)
    rows = read_lines(tmp_path / "mix.jsonl")
    names = (*SEEN, GENERIC) if generic else SEEN
    assert len(rows) == sum(len(read_lines(tmp_path / f"{name}.jsonl")) for name in names)
    own = {row["src"]: name for name in names for row in read_lines(tmp_path / f"{name}.jsonl")}
    true = [own[row["src"]] for row in rows]
    assert true.count(GENERIC) == round(generic * len(rows))
    wrong = [row["domain"] != name for row, name in zip(rows, true, strict=True)]
    assert sum(wrong) == round(randomised * len(rows))
    for row in rows:
        assert row["prompt"] == prompt(row["src"], tagged=True, label=row["domain"])
        assert row["completion"] == " " + row["tgt"]


# -- verdicts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "margin", "said"),
    [
        (-0.3, -0.1, 0.0, HELD),
        (-0.3, 0.1, 0.0, OPEN),
        (0.1, 0.3, 0.0, FAILED),
        (-0.3, 0.01, 0.02, HELD),  # better, or at most a little worse
        (0.01, 0.015, 0.02, HELD),
        (0.01, 0.03, 0.02, OPEN),
        (0.03, 0.04, 0.02, FAILED),
        (float("nan"), float("nan"), 0.02, OPEN),
    ],
)
def test_the_whole_interval_decides(low: float, high: float, margin: float, said: str) -> None:
    assert verdict(Estimate((low + high) / 2, low, high), margin) == said


def cells(gap: float, noise: float, seeds: int = 3) -> dict[tuple[str, int], dict[str, Any]]:
    """`one` loses ``gap`` less per token than `two`, on sentences of many difficulties and lengths."""
    rng, made = np.random.default_rng(1), {}
    tokens = rng.integers(5, 40, 100)
    hard = rng.normal(3, 1, 100)
    for seed in range(seeds):
        for name, better in (("one", gap), ("two", 0.0)):
            nll = (hard - better + rng.normal(0, noise, 100)) * tokens
            row = {"nll": nll.tolist(), "tokens": tokens.tolist(), "scoring_s": 3.0 if better else 2.0}
            made[name, seed] = {"scores": {f"{d}/{NONE}": row for d in (*SEEN, UNSEEN)}}
    return made


def test_differences_are_paired_and_per_token() -> None:
    claim = Claim("", "", ("one", NONE), ("two", NONE))
    sure = difference(cells(0.1, noise=0.05), claim)
    # The spread of difficulty, 1 nat, cancels: what is left is 0.05·√2 over 100 sentences and 3 seeds.
    assert sure.value == pytest.approx(-0.1, abs=0.02)
    assert sure.high - sure.low < 0.05
    assert verdict(sure) == HELD
    back = Claim("", "", ("two", NONE), ("one", NONE), margin=0.02)
    assert verdict(difference(cells(0.1, noise=0.05), back), back.margin) == FAILED
    assert verdict(difference(cells(0.1, noise=5.0), claim)) == OPEN
    assert verdict(difference({}, claim)) == OPEN  # nothing is finished
    only = {
        ("base" if name == "two" else name, seed): cell for (name, seed), cell in cells(0.1, 0.05).items()
    }
    del only["base", 1], only["base", 2]  # its one seed serves for all
    assert difference(only, Claim("", "", ("one", NONE), ("base", NONE))).value == pytest.approx(
        -0.1, abs=0.02
    )


def test_times_are_compared_seed_by_seed() -> None:
    found = speed_difference(cells(0.1, 0.1), "one", "two", "scoring_s")
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


def test_claims_are_about_what_is_scored() -> None:
    for claim in CLAIMS:
        for system, told in (claim.one, claim.other):
            for domain in claim.domains:
                assert told in SYSTEMS[system].conditions(domain), claim


def test_spread_needs_two_seeds() -> None:
    assert spread([1.0], 2) == "1.00"
    assert spread([1.0, 2.0], 1) == "1.5 ±0.7"


def test_a_claim_is_summed_up_from_the_papers_own_lines() -> None:
    def line(group: str, text: str, said: str, role: str = CLAIM) -> dict[str, Any]:
        return {"group": group, "text": text, "verdict": said, "role": role}

    lines = [
        line("Width", "a", HELD), line("Width", "b", HELD), line("Width", "c", FAILED, BEYOND),
        line("Labels", "d", HELD), line("Labels", "e", OPEN), line("Labels", "f", HELD, CHECK),
        line("Labels", "g", FAILED, CHECK),
    ]  # fmt: skip
    assert plainly(lines) == [
        "- **Width: held.**",
        f"- **Labels: in part.** Held: “d”; {OPEN}: “e”. But that g: {FAILED}.",
    ]


def test_the_kept_page_says_what_the_kept_figures_say() -> None:
    path = max(RESULTS.glob("*-nmt.json"))
    results = json.loads(path.read_text(encoding="utf-8"))
    assert page(results) == path.with_suffix(".md").read_text(encoding="utf-8")
    assert all(one["seeds"] == len(results["plan"]["seeds"]) for one in results["claims"])
    for one in results["claims"]:
        assert one["verdict"] == verdict(Estimate(one["value"], one["low"], one["high"]), one["margin"])
