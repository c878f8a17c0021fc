"""Tables of a run, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from .clock import Spread
from .results import BEST_BACKEND, BEST_PEER, OURS, TOTAL, Row
from .routers import GATELESS


def tables(rows: list[Row]) -> str:
    """Every level that was measured."""
    parts = [
        *_models(rows),
        *_growth([row for row in rows if row.level.startswith("growth")]),
        *_layers([row for row in rows if row.level == "layer"]),
        *_memory([row for row in rows if row.level == "memory"]),
        *_loading([row for row in rows if row.level == "loading"]),
        *_routers([row for row in rows if row.level == "routers"]),
    ]
    return "\n\n".join(parts)


def _models(rows: list[Row]) -> Iterable[str]:
    wanted = [row for row in rows if row.level in ("prefill", "decode", "training")]
    for (level, case), group in groupby(wanted, key=lambda row: (row.level, str(row.case))):
        lines = [
            [
                row.contestant,
                f"{row.milliseconds.middle:.1f}" if row.milliseconds else "",
                _cell(row.to.get("base")),
                _cell(row.to.get(TOTAL)),
                _beside(row, BEST_PEER, "best_peer"),
                _percent(row.share),
                _times(row.added_over_floor),
            ]
            for row in group
        ]
        heads = ["", "ms", "÷ base", f"÷ {TOTAL}", "÷ best peer", "floor reached", "added ÷ its floor"]
        yield f"### {level.capitalize()}: {case}\n\n" + _table(heads, lines)


def _growth(rows: list[Row]) -> Iterable[str]:
    if not rows:
        return
    counts = sorted({row.case.experts for row in rows})
    names = list(dict.fromkeys(row.contestant for row in rows))
    lines = []
    for name in names:
        found = {row.case.experts: row.to["base"] for row in rows if row.contestant == name}
        lines.append([name, *(_cell(found.get(count)) for count in counts)])
    yield (
        f"### Growth: prefill ÷ base over E, r={rows[0].case.rank}\n\n"
        + _table(["", *(f"E={count}" for count in counts)], lines)
    )


def _layers(rows: list[Row]) -> Iterable[str]:
    def kind(row: Row) -> tuple[str, str]:
        case = row.case
        return row.step, f"{case.width}×{case.out}, {case.batch * case.tokens} tokens"

    for (step, where), group in groupby(sorted(rows, key=kind), key=kind):
        chosen = list(group)
        names = [name for name in dict.fromkeys(row.contestant for row in chosen) if name != "base"]
        lines = []
        for case in dict.fromkeys(str(row.case) for row in chosen):
            at = {row.contestant: row for row in chosen if str(row.case) == case}
            one = at[OURS]
            top_k = "dense" if one.case.top_k is None else str(one.case.top_k)
            lines.append(
                [
                    f"{one.case.experts}×{one.case.rank}",
                    top_k,
                    *(_short(at[name].to["base"]) if name in at else "" for name in names),
                    _beside(one, BEST_PEER, "best_peer"),
                    _short(one.to.get(BEST_BACKEND)),
                    _percent(one.share),
                    _times(one.added_over_floor),
                ]
            )
        heads = ["E×r", "k", *names, f"{OURS} ÷ best peer", "÷ best backend", "floor", "added ÷ floor"]
        yield f"### One layer, {step}, ÷ base: {where}\n\n" + _table(heads, lines)


def _memory(rows: list[Row]) -> Iterable[str]:
    if not rows:
        return
    first = rows[0]
    lines = [
        [
            row.contestant,
            f"{row.extra['allocated_mib']:.1f}",
            f"{row.extra['resident_mib']:.0f}",
            f"{row.extra['saved_mib']:.1f}",
            f"{row.extra['saved_mib'] - first.extra['saved_mib']:+.1f}",
            f"{row.extra['saved_bytes_per_token_and_layer']:.0f}",
        ]
        for row in rows
    ]
    heads = [
        "",
        "peak allocated, MiB",
        "peak resident",
        "saved for backward",
        f"more than {first.contestant}",
        "bytes/token/layer",
    ]
    yield f"### Memory of a training step: {first.case}\n\n" + _table(heads, lines)


def _loading(rows: list[Row]) -> Iterable[str]:
    for row in rows:
        found = row.extra
        yield (
            f"### Loading {found['experts']} adapters of rank {row.case.rank}: width {found['width']}, "
            f"{found['layers']} layers, base without weights\n\n"
            f"Peak {found['peak_mib']:.0f} MiB above the process before; the mixture holds "
            f"{found['mixture_mib']:.0f} MiB, of which routers {found['routers_mib']:.0f}, one adapter "
            f"{found['adapter_mib']:.0f}. {found['cpu_seconds']:.1f} s of CPU, {found['seconds']:.1f} s.\n\n"
            f"CPU time of importing the package after PEFT {found['import_seconds']:.2f} s, of 8 experts of "
            f"rank 16 in the model of 32 million parameters {found['injection_seconds']:.2f} s."
        )


def _routers(rows: list[Row]) -> Iterable[str]:
    if not rows:
        return
    steps = list(dict.fromkeys(row.step for row in rows))
    lines = []
    for name in dict.fromkeys(row.contestant for row in rows):
        found = {row.step: row.to[GATELESS] for row in rows if row.contestant == name}
        lines.append([name, *(_cell(found.get(step)) for step in steps)])
    yield f"### Ways to decide, ÷ {GATELESS}: {rows[0].case}\n\n" + _table(["", *steps], lines)


def _table(heads: list[str], lines: list[list[str]]) -> str:
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)], *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in rows)


def _cell(value: Spread | None) -> str:
    return "" if value is None else str(value)


def _short(value: Spread | None) -> str:
    return "" if value is None else f"{value.middle:.2f} ± {(value.high - value.low) / 2:.2f}"


def _beside(row: Row, key: str, who: str) -> str:
    value = row.to.get(key)
    return "" if value is None else f"{value.middle:.2f} ({row.extra[who]})"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}×"
