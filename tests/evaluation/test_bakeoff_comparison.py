"""Results and advice, from scores whose answers are known."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from rich.console import Console

from peft_moe.evaluation import TurnScore
from peft_moe.evaluation.bakeoff.build import Cost
from peft_moe.evaluation.bakeoff.comparison import MEAN, Comparison, oracle_scores
from peft_moe.evaluation.bakeoff.methods import FITTED, NO_DATA, TRAINED, Method, references
from peft_moe.evaluation.bakeoff.plot import plot
from peft_moe.evaluation.bakeoff.recommendation import advise
from peft_moe.evaluation.bakeoff.records import Record
from peft_moe.evaluation.bakeoff.report import tables, write_csv
from peft_moe.evaluation.bakeoff.texts import MARKED, RUNNING, Row

TEXTS = 40
EXPERTS = {"law": "", "code": ""}
ROWS = [
    Row("law", "expert", [[("q", "a")]] * TEXTS, [["law"]] * TEXTS),
    Row("code", "expert", [[("q", "a")]] * TEXTS, [["code"]] * TEXTS),
    Row("news", "unseen", [[("q", "a")]] * TEXTS, [[None]] * TEXTS),
    Row(MARKED, "mixed", [[("q", "a"), ("q", "a")]] * TEXTS, [["law", "code"]] * TEXTS),
    Row(RUNNING, "mixed", [[("q", "a"), ("q", "a")]] * TEXTS, [["code"]] * TEXTS),
]


def scores(kept: float, noise: float = 0.0, seed: int = 0, unseen: float = 4.0):
    """Losses of a method that keeps this share of a gain from 4 to 3 nats per token, texts of 10 tokens."""
    rng = np.random.default_rng(seed)

    def turn(loss: float) -> TurnScore:
        return TurnScore(10 * (loss + noise * rng.normal()), 10, loss < 3.5)

    found = {}
    for row in ROWS:
        loss = unseen if row.kind == "unseen" else 4.0 - kept
        found[row.name] = [[turn(loss) for _ in owners] for owners in row.owners]
    return found


def compare(scored: dict[str, tuple[str, list]], measure: str = "loss") -> Comparison:
    """The base keeps 0, each expert 1; so does the oracle. ``scored``: name → group, scores of each seed."""
    methods = [
        *references(EXPERTS),
        *(Method(name, "mixture", group=group) for name, (group, _) in scored.items()),
    ]
    runs = {"base": [scores(0.0)], "law": [scores(1.0)], "code": [scores(1.0)]}
    runs |= {name: of_seeds for name, (_, of_seeds) in scored.items()}
    records = {
        name: [
            Record(name, seed, "", Cost(seconds=3.0, tokens_per_second=9.0), of_seed)
            for seed, of_seed in enumerate(of_seeds)
        ]
        for name, of_seeds in runs.items()
    }
    return Comparison(methods, records, ROWS, measure, draws=400)


def test_shares_changes_and_the_oracle() -> None:
    results = compare({"half": (NO_DATA, [scores(0.5, unseen=4.4)])}).results
    for name, kept, change in (("base", 0, 0), ("half", 0.5, 0.1), ("oracle", 1, 0)):
        one = results[name]
        for row in ("law", "code", MEAN, MARKED, RUNNING):
            assert one.shares[row].value == pytest.approx(kept, abs=1e-12)
        assert one.changes["news"].value == pytest.approx(change, abs=1e-12)
    assert results["half"].values["law"].value == pytest.approx(3.5)


def test_exact_answers_have_shares_too() -> None:
    results = compare({"most": (NO_DATA, [scores(0.9)]), "few": (NO_DATA, [scores(0.1)])}, "exact").results
    assert results["most"].shares[MEAN].value == 1.0
    assert results["few"].shares[MEAN].value == 0.0


def test_the_oracle_takes_each_turn_from_its_owner() -> None:
    law, code, base = scores(0.1), scores(0.2), scores(0.0)
    records = {n: [Record(n, 0, "", Cost(), s)] for n, s in (("base", base), ("law", law), ("code", code))}
    found = oracle_scores(records, ROWS)
    assert found["law"] == law["law"]
    assert found["news"] == base["news"]
    assert found[MARKED][0] == [law[MARKED][0][0], code[MARKED][0][1]]


def test_identical_methods_differ_by_exactly_nothing() -> None:
    runs = [scores(0.5, noise=0.3, seed=s) for s in range(3)]
    comparison = compare({"one": (TRAINED, runs), "same": (TRAINED, runs)})
    difference = comparison.difference("one", "same")
    assert (difference.value, difference.low, difference.high) == (0.0, 0.0, 0.0)


def test_noise_makes_intervals_and_the_mean_is_over_domains() -> None:
    one = compare({"noisy": (NO_DATA, [scores(0.5, noise=0.5, seed=1)])}).results["noisy"]
    assert one.shares[MEAN].value == pytest.approx((one.shares["law"].value + one.shares["code"].value) / 2)
    assert one.shares[MEAN].high - one.shares[MEAN].low > 0.05
    assert one.shares[MEAN].low < 0.5 < one.shares[MEAN].high


def test_turns_that_were_cut_off_do_not_count() -> None:
    found = scores(0.5)
    found["law"][0] = [TurnScore(0.0, 0, True)]
    for measure in ("loss", "exact"):
        compared = compare({"half": (NO_DATA, [found])}, measure).results["half"].values["law"]
        assert compared.value == pytest.approx(3.5 if measure == "loss" else 0.0)


def test_a_domain_without_gain_has_no_part_in_the_mean() -> None:
    methods = references(EXPERTS)
    runs = {"base": scores(0.0), "law": scores(1.0), "code": scores(0.0)}
    records = {name: [Record(name, 0, "", Cost(), one)] for name, one in runs.items()}
    comparison = Comparison(methods, records, ROWS, "loss", draws=10)
    assert comparison.gainful == ["law"]
    assert comparison.results["law"].shares[MEAN].value == 1.0


def advice(**shares: float) -> str:
    groups = {"cheap": NO_DATA, "solved": FITTED, "learnt": TRAINED}
    methods = {
        name: (groups[name], [scores(kept, noise=0.2, seed=number)])
        for number, (name, kept) in enumerate(shares.items())
    }
    return "\n".join(advise(compare(methods)))


def test_advice_follows_the_numbers() -> None:
    assert "Recommendation: learnt (trained); the best of all" in advice(cheap=0.1, solved=0.5, learnt=0.9)
    assert "Recommendation: solved (fitted" in advice(cheap=0.1, solved=0.9, learnt=0.4)
    assert "Recommendation: cheap (without any data)" in advice(cheap=0.9, solved=0.5, learnt=0.4)
    assert "Recommendation: the base alone" in advice(cheap=-0.5, solved=-0.2, learnt=-0.9)


def test_less_effort_wins_where_more_is_not_significantly_better() -> None:
    text = advice(cheap=0.1, solved=0.80, learnt=0.801)
    assert "Recommendation: solved" in text
    assert "not significant" in text


def test_advice_names_what_is_as_good_and_who_had_one_seed() -> None:
    methods = {"a": (TRAINED, [scores(0.7, 0.2, 1)]), "b": (TRAINED, [scores(0.7, 0.2, 2)])}
    lines = advise(compare(methods))
    assert any("not significantly worse: " in line for line in lines)
    assert any(line.startswith("Trained with one seed only: a, b") for line in lines)


def test_advice_speaks_of_domains_without_an_expert() -> None:
    lines = advise(compare({"harmful": (NO_DATA, [scores(0.5, unseen=4.4)])}))
    assert any("On news" in line and "+10.0 %" in line for line in lines)


@pytest.mark.parametrize(("width", "number"), [(200, 1), (80, 2), (40, 5)])
def test_tables_fit_the_console_and_hold_every_method(width, number) -> None:
    comparison = compare({"half": (NO_DATA, [scores(0.5, noise=0.3)])})
    found = tables(comparison, ROWS, Console(width=width))
    assert len(found) == number
    for one in found:
        file = io.StringIO()
        Console(file=file, width=width).print(one)
        assert all(name in file.getvalue() for name in ("base", "half", "oracle"))
        assert "…" not in file.getvalue()  # nothing was cut
    assert len({column.header for one in found for column in one.columns}) == 11


def test_csv_and_picture_are_written(tmp_path) -> None:
    comparison = compare({"half": (NO_DATA, [scores(0.5)])})
    write_csv(tmp_path / "results.csv", {"loss": comparison})
    lines = list(csv.DictReader((tmp_path / "results.csv").open()))
    found = [line for line in lines if line["method"] == "half" and line["row"] == MEAN]
    assert [float(line["value"]) for line in found if line["quantity"] == "share"] == [pytest.approx(0.5)]
    costs = {x["quantity"]: float(x["value"]) for x in lines if x["method"] == "half" and not x["row"]}
    assert costs == {"trainable": 0, "seconds": 3, "tokens_per_second": 9}
    plot(comparison, ROWS, tmp_path / "results.png")
    assert (tmp_path / "results.png").read_bytes()[:4] == b"\x89PNG"
