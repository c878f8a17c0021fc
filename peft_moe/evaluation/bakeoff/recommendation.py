"""A recommendation in sentences, computed from the comparison."""

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
    """Name the best method of each group, the gain from more effort, the method to use, and its cost.

    A difference is called significant if its 95 % interval excludes zero. Intervals are paired over texts
    and seeds. They are not corrected for the number of methods.

    Returns:
        One sentence or more per line.
    """
    best = {group: comparison.ranked(group)[0] for group in EFFORT if comparison.ranked(group)}
    if not best:
        return ["Only the references have been scored so far."]
    lines = [_best_of(comparison, group, result) for group, result in best.items()]
    lines += _steps(comparison, list(best.values()))
    chosen = _choose(comparison, list(best.values()))
    if chosen.shares[MEAN].value <= 0:
        return [*lines, "Recommendation: the base alone. No method keeps any of the oracle's gain."]
    lines.append(_recommendation(comparison, chosen))
    lines += _after_the_switch(comparison, chosen)
    lines += _elsewhere(comparison, chosen)
    one_seed = sorted({r.name for r in comparison.ranked() if r.seeds == 1 and r.group == TRAINED})
    if one_seed:
        lines.append(
            f"Trained with one seed only: {', '.join(one_seed)}; their intervals leave out "
            "the variation between trainings."
        )
    return lines


def percent(estimate: Estimate, digits: int = 0) -> str:
    """Format an estimate with its interval, such as ``"61 % [57, 66]"``."""
    e = estimate.scaled(100)
    return f"{e.value:.{digits}f} % [{e.low:.{digits}f}, {e.high:.{digits}f}]"


def _points(difference: Estimate) -> str:
    d = difference.scaled(100)
    word = "significant" if difference.differs_from_zero else "not significant"
    return f"{d.value:+.1f} points [{d.low:+.1f}, {d.high:+.1f}], {word}"


def _best_of(comparison: Comparison, group: str, best: MethodResult) -> str:
    equals = [
        other.name
        for other in comparison.ranked(group)
        if other is not best and not comparison.difference(best.name, other.name).differs_from_zero
    ]
    tied = f"; not significantly worse: {', '.join(equals)}" if equals else ""
    return (
        f"Best {TITLES[group]}: {best.name}, {percent(best.shares[MEAN])} of the oracle's gain over the "
        f"base, mean over domains{tied}."
    )


def _steps(comparison: Comparison, best: list[MethodResult]) -> list[str]:
    return [
        f"{after.name} against {before.name}: {_points(comparison.difference(after.name, before.name))}."
        for before, after in pairwise(best)
    ]


def _choose(comparison: Comparison, best: list[MethodResult]) -> MethodResult:
    """Choose the method of least effort that is not significantly worse than the best of all."""
    top = max(best, key=lambda result: result.shares[MEAN].value)
    return next(
        result
        for result in best
        if result is top or not comparison.difference(top.name, result.name).differs_from_zero
    )


def _recommendation(comparison: Comparison, chosen: MethodResult) -> str:
    weakest = min(comparison.gainful, key=lambda row: chosen.shares[row].value)
    top = comparison.ranked()[0]
    reason = (
        "the best of all"
        if chosen is top
        else f"it needs less than {top.name}, which is not significantly better "
        f"({_points(comparison.difference(top.name, chosen.name))})"
    )
    return (
        f"Recommendation: {chosen.name} ({TITLES[chosen.group]}); {reason}. Its weakest domain is {weakest}, "
        f"{percent(chosen.shares[weakest])}. It took {chosen.cost.seconds:.0f} s to build."
    )


def _after_the_switch(comparison: Comparison, chosen: MethodResult) -> list[str]:
    if RUNNING not in chosen.shares:
        return []
    top = comparison.ranked(row=RUNNING)[0]
    text = f"After an unmarked change of domain {chosen.name} keeps {percent(chosen.shares[RUNNING])}"
    if top is chosen:
        return [f"{text}, more than any other method."]
    difference = comparison.difference(top.name, chosen.name, RUNNING)
    best = f"the best method there is {top.name}, {percent(top.shares[RUNNING])}"
    return [f"{text}; {best} ({_points(difference)})."]


def _elsewhere(comparison: Comparison, chosen: MethodResult) -> list[str]:
    lines = []
    for row, change in chosen.changes.items():
        by_loss = comparison.measure == "loss"
        measure, unit = ("the loss", "%") if by_loss else ("exact answers", "points")
        note = "" if change.differs_from_zero else ", not significant"
        c = change.scaled(100)
        lines.append(
            f"On {row}, which has no expert, {chosen.name} changes {measure} by {c.value:+.1f} {unit} "
            f"[{c.low:+.1f}, {c.high:+.1f}]{note}."
        )
    return lines
