"""A recommendation in plain words, computed from the comparison."""

from __future__ import annotations

from itertools import pairwise

from .comparison import MEAN, Comparison, MethodResult
from .methods import EFFORT, FITTED, NO_DATA, RETRAINED, TRAINED
from .statistics import Estimate
from .texts import RUNNING

TITLES = {
    NO_DATA: "without any data",
    FITTED: "fitted on labelled prompts, no gradients",
    TRAINED: "trained",
    RETRAINED: "without experts, retrained on all data",
}


def advise(comparison: Comparison) -> list[str]:
    """Sentences: the best of each group, what more effort brings, what to take, and its price.

    A difference is called significant if its 95 % interval leaves zero out. Intervals are paired over
    texts (and seeds), and not widened for the number of methods.
    """
    best = {group: comparison.ranked(group)[0] for group in EFFORT if comparison.ranked(group)}
    if not best:
        return ["No method has been scored yet beside the references."]
    lines = [_best_of(comparison, group, one) for group, one in best.items()]
    lines += _steps(comparison, list(best.values()))
    chosen = _choose(comparison, list(best.values()))
    if chosen.shares[MEAN].value <= 0:
        return [*lines, "Recommendation: the base alone. No method keeps any of the oracle's gain."]
    lines.append(_recommendation(comparison, chosen))
    lines += _behind_the_switch(comparison, chosen)
    lines += _elsewhere(comparison, chosen)
    few = sorted({one.name for one in comparison.ranked() if one.seeds == 1 and one.group == TRAINED})
    if few:
        lines.append(
            f"Trained with one seed only: {', '.join(few)}; their intervals do not hold for another training."
        )
    return lines


def percent(estimate: Estimate, digits: int = 0) -> str:
    """``"61 % [57, 66]"``."""
    e = estimate.scaled(100)
    return f"{e.value:.{digits}f} % [{e.low:.{digits}f}, {e.high:.{digits}f}]"


def _points(difference: Estimate) -> str:
    d = difference.scaled(100)
    word = "significant" if difference.differs_from_zero else "not significant"
    return f"{d.value:+.1f} points [{d.low:+.1f}, {d.high:+.1f}], {word}"


def _best_of(comparison: Comparison, group: str, one: MethodResult) -> str:
    alike = [
        other.name
        for other in comparison.ranked(group)
        if other is not one and not comparison.difference(one.name, other.name).differs_from_zero
    ]
    tied = f"; not significantly worse: {', '.join(alike)}" if alike else ""
    return (
        f"Best {TITLES[group]}: {one.name}, {percent(one.shares[MEAN])} of the oracle's gain over the base, "
        f"mean over domains{tied}."
    )


def _steps(comparison: Comparison, best: list[MethodResult]) -> list[str]:
    return [
        f"{after.name} against {before.name}: {_points(comparison.difference(after.name, before.name))}."
        for before, after in pairwise(best)
    ]


def _choose(comparison: Comparison, best: list[MethodResult]) -> MethodResult:
    """The method of least effort that is not significantly worse than the best of all."""
    top = max(best, key=lambda one: one.shares[MEAN].value)
    return next(
        one for one in best if one is top or not comparison.difference(top.name, one.name).differs_from_zero
    )


def _recommendation(comparison: Comparison, chosen: MethodResult) -> str:
    weakest = min(comparison.gainful, key=lambda row: chosen.shares[row].value)
    top = comparison.ranked()[0]
    reason = (
        "the best of all"
        if chosen is top
        else f"it asks for less than {top.name}, which is not significantly better "
        f"({_points(comparison.difference(top.name, chosen.name))})"
    )
    return (
        f"Recommendation: {chosen.name} ({TITLES[chosen.group]}); {reason}. Its weakest domain is {weakest}, "
        f"{percent(chosen.shares[weakest])}. It took {chosen.cost.seconds:.0f} s to make."
    )


def _behind_the_switch(comparison: Comparison, chosen: MethodResult) -> list[str]:
    if RUNNING not in chosen.shares:
        return []
    top = comparison.ranked(row=RUNNING)[0]
    text = f"Behind an unmarked change of domain {chosen.name} keeps {percent(chosen.shares[RUNNING])}"
    if top is chosen:
        return [f"{text}, more than any other."]
    difference = comparison.difference(top.name, chosen.name, RUNNING)
    return [f"{text}; the best there is {top.name}, {percent(top.shares[RUNNING])} ({_points(difference)})."]


def _elsewhere(comparison: Comparison, chosen: MethodResult) -> list[str]:
    lines = []
    for row, change in chosen.changes.items():
        what = "the loss by" if comparison.measure == "loss" else "exact answers by"
        unit = "%" if comparison.measure == "loss" else "points"
        word = "" if change.differs_from_zero else ", not significant"
        c = change.scaled(100)
        lines.append(
            f"On {row}, which has no expert, {chosen.name} changes {what} {c.value:+.1f} {unit} "
            f"[{c.low:+.1f}, {c.high:+.1f}]{word}."
        )
    return lines
