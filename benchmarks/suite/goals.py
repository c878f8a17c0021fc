"""The project's own goals, each with the figure of this run: met or missed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .experts import Case
from .models import FULL, GOAL
from .results import OURS, TOTAL, Row

Line = tuple[str, str, bool]


def goals(rows: list[Row]) -> str:
    """A table; empty when nothing that a goal asks about was measured."""
    found = list(_lines(rows))
    if not found:
        return ""
    body = [f"| {what} | {value} | {'met' if met else '**missed**'} |" for what, value, met in found]
    return "\n".join(["### Goals", "", "| goal | measured | |", "|---|---|---|", *body])


def _lines(rows: list[Row]) -> Iterator[Line]:
    for level in ("prefill", "training"):
        row = _find(rows, level, GOAL, OURS)
        if row is not None:
            ratio = row.to[TOTAL].middle
            yield (
                f"{level} ≤ 1.10 × one LoRA of the same total rank, E=8, r=16",
                f"{ratio:.2f}",
                ratio <= 1.10,
            )
    one, other = (_find(rows, "growth, prefill", _with(experts), OURS) for experts in (8, 128))
    if one is not None and other is not None:
        ratio = other.to["base"].middle / one.to["base"].middle
        yield "prefill at E=128 ≤ 1.6 × E=8, r=16", f"{ratio:.2f}", ratio <= 1.6
    for level, bound in (("prefill", 8.0), ("decode", 13.0)):
        yield from _faster(rows, level, "PEFT X-LoRA", bound)
    for peer in ("mergoo", "ours, reference"):
        yield from _faster(rows, "training", peer, 4.0)
    row, lora, base = (_find(rows, "decode", GOAL, name) for name in (OURS, TOTAL, "base"))
    if row is not None and lora is not None and base is not None:
        bare = _ms(base)
        ratio = (_ms(row) - bare) / (_ms(lora) - bare)
        yield (
            "decoding: added time per token ≤ 1.25 × that of one LoRA of the same total rank",
            f"{ratio:.2f}",
            ratio <= 1.25,
        )
    against = [row for row in rows if row.contestant == OURS and "best peer" in row.to]
    if against:
        worst = max(against, key=lambda row: row.to["best peer"].middle)
        slower = sum(row.to["best peer"].middle > 1 for row in against)
        yield (
            "never slower than any peer",
            f"slower at {slower} of {len(against)} points; worst {worst.to['best peer'].middle:.2f} × "
            f"{worst.extra['best_peer']} ({worst.level}, {worst.step}, {worst.case})",
            slower == 0,
        )
    grouped = [
        row.added_over_floor
        for row in rows
        if row.level == "layer"
        and row.contestant == "ours, grouped"
        and row.added_over_floor is not None
        and row.case.batch * row.case.tokens > 1
    ]
    if grouped:
        yield (
            "the sparse path at most 3.5–15 × its floor (it stood at 7–30 ×)",
            f"{min(grouped):.1f}–{max(grouped):.1f} ×",
            max(grouped) <= 15,
        )


def _faster(rows: list[Row], level: str, other: str, bound: float) -> Iterator[Line]:
    one, peer = _find(rows, level, FULL, OURS), _find(rows, level, FULL, other)
    if one is not None and peer is not None:
        ratio = _ms(peer) / _ms(one)
        yield f"{level} ≥ {bound:.0f} × as fast as {other}, E=16, r=8", f"{ratio:.1f}", ratio >= bound


def _with(experts: int) -> Case:
    return replace(GOAL, experts=experts)


def _find(rows: list[Row], level: str, case: Case, name: str) -> Row | None:
    return next((r for r in rows if (r.level, r.case, r.contestant) == (level, case, name)), None)


def _ms(row: Row) -> float:
    assert row.milliseconds is not None
    return row.milliseconds.middle
