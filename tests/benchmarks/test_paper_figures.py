"""What the reproductions of papers compute from their cells: shares, verdicts, cells that are kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.modular_text import DOMAINS, _each, rates, reaches
from benchmarks.papers import HELD, NOT, OPEN, Cells, Figures, above_zero, alike, all_of, no_worse
from peft_moe.evaluation.bakeoff.statistics import Estimate


def cell(method: str, seed: int, *losses: float, records: int = 20) -> dict[str, object]:
    """Of two domains; every record has 10 tokens at this loss each."""
    scores = {d: [(10 * loss, 10)] * records for d, loss in zip("ab", losses, strict=True)}
    return {"method": method, "seed": seed, "scores": scores}


@pytest.mark.parametrize(
    ("low", "high", "above", "not_worse", "same"),
    [
        (0.2, 0.3, HELD, HELD, NOT),
        (0.01, 0.05, HELD, HELD, HELD),
        (-0.05, 0.05, OPEN, HELD, HELD),
        (-0.2, 0.2, OPEN, OPEN, OPEN),
        (-0.2, -0.05, NOT, OPEN, OPEN),
        (-0.3, -0.2, NOT, NOT, NOT),
        (float("nan"), float("nan"), OPEN, OPEN, OPEN),
    ],
)
def test_verdicts_follow_from_intervals(low, high, above, not_worse, same):
    e = Estimate((low + high) / 2, low, high)
    assert (above_zero(e), no_worse(e, 0.1), alike(e, 0.1)) == (above, not_worse, same)


def test_a_claim_of_several_parts_needs_all_of_them():
    assert all_of([HELD, HELD]) == HELD
    assert all_of([HELD, OPEN]) == OPEN
    assert all_of([HELD, OPEN, NOT]) == NOT


def test_shares_are_of_the_gain_of_each_domains_own_expert():
    cells = [cell("base", 0, 4.0, 3.0)]
    for seed, shift in enumerate((-0.1, 0.0, 0.1)):
        cells += [cell("own a", seed, 3.0, 5.0), cell("own b", seed, 5.0, 1.0)]
        cells.append(cell("mixed", seed, 3.5 + shift, 2.5))
    figures = Figures(cells, "ab", draws=200)
    values = figures.shares("mixed", {"a": "own a", "b": "own b"})
    # The mean loss falls by (0.5 + 0.5) / 2 of (1 + 2) / 2.
    assert figures.estimate(values).value == pytest.approx(1 / 3)
    assert figures.spread(figures.losses("mixed", "a")) == pytest.approx(0.1)
    assert np.isnan(figures.spread(figures.losses("base", "a")))
    seeds = figures.estimate(figures.losses("mixed", "a"))
    assert 3.4 <= seeds.low < 3.5 < seeds.high <= 3.6


def test_a_method_that_lacks_a_seed_is_refused():
    figures = Figures(
        [cell("one", s, 1.0, 1.0) for s in range(3)] + [cell("two", s, 1.0, 1.0) for s in (0, 2)], "ab"
    )
    with pytest.raises(SystemExit, match="finish the run"):
        figures.losses("two", "a")


def test_a_torn_last_line_is_made_again(tmp_path: Path):
    cells = Cells(tmp_path)
    cells.run("first", 0, lambda: {"scores": {}})
    with cells.path.open("a") as file:
        file.write('{"method": "second", "se')
    again = Cells(tmp_path)
    assert [c["method"] for c in again.done] == ["first"]
    again.run("first", 0, lambda: pytest.fail("it is there already"))
    again.run("second", 0, lambda: {"scores": {}})
    assert [json.loads(line)["method"] for line in cells.path.read_text().splitlines()] == ["first", "second"]


def test_a_run_of_other_sizes_is_not_continued(tmp_path: Path):
    Cells(tmp_path).check({"steps": 1})
    Cells(tmp_path).check({"steps": 1})
    with pytest.raises(SystemExit, match="other sizes"):
        Cells(tmp_path).check({"steps": 2})


def test_precision_recall_and_f1_of_each_domain():
    true = ["english", "english", "french", "german", "python"] * 40
    said = ["english", "python", "french", "german", "python"] * 40
    table, e = rates([{"method": "m", "true": true, "found": said}], "m", draws=100)
    english, python = dict(zip(DOMAINS, table, strict=False))["english"], table[DOMAINS.index("python")]
    assert english == pytest.approx([1.0, 0.5, 2 / 3])
    assert python == pytest.approx([0.5, 1.0, 2 / 3])
    assert e.value == pytest.approx((1 + 1 + 2 / 3 + 2 / 3) / 4)
    assert reaches(e) == NOT
    assert reaches(Estimate(1.0, 1.0, 1.0)) == HELD
    assert reaches(Estimate(0.999, 0.997, 1.0)) == OPEN
    assert _each(np.array(true), np.array(true)).min() == 1
