"""The project's goals, each with this run's figure: met or missed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .experts import Case
from .models import FULL, GOAL
from .results import BEST_PEER, OURS, TOTAL, Row

Line = tuple[str, str, bool]


def goals(rows: list[Row], bounds: dict[str, str] | None = None) -> str:
    """Return a table, or an empty string if no goal was measured.

    Args:
        rows: the run's rows.
        bounds: for each step, the operations that take longer than in one LoRA of the same total rank.
    """
    lines = list(_lines(rows))
    if not lines:
        return ""
    body = [f"| {goal} | {value} | {'met' if met else '**missed**'} |" for goal, value, met in lines]
    missed = [goal for goal, _, met in lines if not met]
    for step, operations in (bounds or {}).items():
        if any(goal.startswith(step[:5]) for goal in missed):
            body += ["", f"What bounds {step}, in ms beyond one LoRA of the same total rank: {operations}."]
    return "\n".join(["### Goals", "", "| goal | measured | |", "|---|---|---|", *body])


def _lines(rows: list[Row]) -> Iterator[Line]:
    yield from _against_one_lora(rows)
    few, many = (_find(rows, "growth, prefill", replace(GOAL, experts=count), OURS) for count in (8, 128))
    if few is not None and many is not None:
        ratio = many.to["base"].middle / few.to["base"].middle
        yield "prefill at E=128 ≤ 1.6 × E=8, r=16", f"{ratio:.2f}", ratio <= 1.6
    for level, bound in (("prefill", 8.0), ("decode", 13.0)):
        yield from _faster(rows, level, "PEFT X-LoRA", bound)
    for peer in ("mergoo", "ours, reference"):
        yield from _faster(rows, "training", peer, 4.0)
    yield from _against_peers(rows)
    yield from _loading(rows)
    yield from _sparse_path(rows)


def _against_one_lora(rows: list[Row]) -> Iterator[Line]:
    for level in ("prefill", "training"):
        row = _find(rows, level, GOAL, OURS)
        if row is not None:
            ratio = row.to[TOTAL].middle
            goal = f"{level} ≤ 1.10 × one LoRA of the same total rank, E=8, r=16"
            yield goal, f"{ratio:.2f}", ratio <= 1.10
    row, lora, base = (_find(rows, "decode", GOAL, name) for name in (OURS, TOTAL, "base"))
    if row is not None and lora is not None and base is not None:
        ratio = (_ms(row) - _ms(base)) / (_ms(lora) - _ms(base))
        goal = "decoding: added time per token ≤ 1.25 × that of one LoRA of the same total rank, E=8, r=16"
        yield goal, f"{ratio:.2f}", ratio <= 1.25
    row, lora = (_find(rows, "memory", FULL, name) for name in (OURS, TOTAL))
    if row is not None and lora is not None:
        here, there = row.extra["allocated_mib"], lora.extra["allocated_mib"]
        goal = "peak memory of a training step ≤ that of one LoRA of the same total rank, E=16, r=8"
        process = f"resident {row.extra['resident_mib']:.0f} against {lora.extra['resident_mib']:.0f}, ± 15"
        yield goal, f"{here:.1f} against {there:.1f} MiB allocated ({process})", here <= there


def _loading(rows: list[Row]) -> Iterator[Line]:
    for row in rows:
        if row.level == "loading":
            figures = row.extra
            bound = figures["mixture_mib"] + figures["adapter_mib"]
            goal = f"loading {figures['experts']} adapters peaks at the mixture + one of them"
            yield goal, f"{figures['peak_mib']:.0f} of {bound:.0f} MiB", figures["peak_mib"] <= bound
            importing, injecting = figures["import_seconds"], figures["injection_seconds"]
            yield "import ≤ 0.3 s above PEFT's own", f"{importing:.2f} s", importing <= 0.3
            yield "8 experts in the 30M model in under 1 s", f"{injecting:.2f} s", injecting < 1


def _against_peers(rows: list[Row]) -> Iterator[Line]:
    compared = [row for row in rows if row.method == OURS and BEST_PEER in row.to]
    if compared:
        worst = max(compared, key=lambda row: row.to[BEST_PEER].middle)
        slower = sum(row.to[BEST_PEER].middle > 1 for row in compared)
        figure = (
            f"slower at {slower} of {len(compared)} points; worst {worst.to[BEST_PEER].middle:.2f} × "
            f"{worst.extra['best_peer']} ({worst.level}, {worst.step}, {worst.case})"
        )
        yield "never slower than any peer", figure, slower == 0


def _sparse_path(rows: list[Row]) -> Iterator[Line]:
    ratios = [
        row.added_over_floor
        for row in rows
        if (row.level, row.method) == ("layer", f"{OURS}, grouped")
        and row.case.batch * row.case.tokens > 1
        and row.added_over_floor is not None
    ]
    if ratios:
        goal = "the sparse path at most 3.5–15 × its floor (it was at 7–30 ×)"
        yield goal, f"{min(ratios):.1f}–{max(ratios):.1f} ×", max(ratios) <= 15


def _faster(rows: list[Row], level: str, other: str, bound: float) -> Iterator[Line]:
    ours, peer = _find(rows, level, FULL, OURS), _find(rows, level, FULL, other)
    if ours is not None and peer is not None:
        ratio = _ms(peer) / _ms(ours)
        yield f"{level} ≥ {bound:.0f} × as fast as {other}, E=16, r=8", f"{ratio:.1f}", ratio >= bound


def _find(rows: list[Row], level: str, case: Case, name: str) -> Row | None:
    return next((r for r in rows if (r.level, r.case, r.method) == (level, case, name)), None)


def _ms(row: Row) -> float:
    assert row.milliseconds is not None
    return row.milliseconds.middle
