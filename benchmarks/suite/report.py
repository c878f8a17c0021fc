"""The tables of a run, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from .clock import Spread
from .results import BEST_BACKEND, BEST_PEER, OURS, TOTAL, Row
from .routers import GATELESS


def tables(rows: list[Row]) -> str:
    """Return the tables of all measured levels."""
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
    model_rows = [row for row in rows if row.level in ("prefill", "decode", "training")]
    for (level, case), group in groupby(model_rows, key=lambda row: (row.level, str(row.case))):
        lines = [
            [
                row.method,
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
    names = list(dict.fromkeys(row.method for row in rows))
    lines = []
    for name in names:
        by_count = {row.case.experts: row.to["base"] for row in rows if row.method == name}
        lines.append([name, *(_cell(by_count.get(count)) for count in counts)])
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
        names = [name for name in dict.fromkeys(row.method for row in chosen) if name != "base"]
        lines = []
        for case in dict.fromkeys(str(row.case) for row in chosen):
            by_name = {row.method: row for row in chosen if str(row.case) == case}
            ours = by_name[OURS]
            top_k = "dense" if ours.case.top_k is None else str(ours.case.top_k)
            lines.append(
                [
                    f"{ours.case.experts}×{ours.case.rank}",
                    top_k,
                    *(_short(by_name[name].to["base"]) if name in by_name else "" for name in names),
                    _beside(ours, BEST_PEER, "best_peer"),
                    _short(ours.to.get(BEST_BACKEND)),
                    _percent(ours.share),
                    _times(ours.added_over_floor),
                ]
            )
        heads = ["E×r", "k", *names, f"{OURS} ÷ best peer", "÷ best backend", "floor", "added ÷ floor"]
        yield f"### One layer, {step}, ÷ base: {where}\n\n" + _table(heads, lines)


def _memory(rows: list[Row]) -> Iterable[str]:
    if not rows:
        return
    base = rows[0]
    lines = [
        [
            row.method,
            f"{row.extra['allocated_mib']:.1f}",
            f"{row.extra['resident_mib']:.0f}",
            f"{row.extra['saved_mib']:.1f}",
            f"{row.extra['saved_mib'] - base.extra['saved_mib']:+.1f}",
            f"{row.extra['saved_bytes_per_token_and_layer']:.0f}",
        ]
        for row in rows
    ]
    heads = [
        "",
        "peak allocated, MiB",
        "peak resident",
        "saved for backward",
        f"more than {base.method}",
        "bytes/token/layer",
    ]
    yield f"### Memory of a training step: {base.case}\n\n" + _table(heads, lines)


def _loading(rows: list[Row]) -> Iterable[str]:
    for row in rows:
        figures = row.extra
        yield (
            f"### Loading {figures['experts']} adapters of rank {row.case.rank}: width {figures['width']}, "
            f"{figures['layers']} layers, base without weights\n\n"
            f"Peak {figures['peak_mib']:.0f} MiB above the process before; the mixture holds "
            f"{figures['mixture_mib']:.0f} MiB, of which routers {figures['routers_mib']:.0f}, one adapter "
            f"{figures['adapter_mib']:.0f}. {figures['cpu_seconds']:.1f} s of CPU, "
            f"{figures['seconds']:.1f} s.\n\n"
            f"CPU time of importing the package after PEFT {figures['import_seconds']:.2f} s, of 8 experts "
            f"of rank 16 in the model of 32 million parameters {figures['injection_seconds']:.2f} s."
        )


def _routers(rows: list[Row]) -> Iterable[str]:
    if not rows:
        return
    steps = list(dict.fromkeys(row.step for row in rows))
    lines = []
    for name in dict.fromkeys(row.method for row in rows):
        by_step = {row.step: row.to[GATELESS] for row in rows if row.method == name}
        lines.append([name, *(_cell(by_step.get(step)) for step in steps)])
    yield f"### Routers, ÷ {GATELESS}: {rows[0].case}\n\n" + _table(["", *steps], lines)


def _table(heads: list[str], lines: list[list[str]]) -> str:
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)], *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in rows)


def _cell(value: Spread | None) -> str:
    return "" if value is None else str(value)


def _short(value: Spread | None) -> str:
    return "" if value is None else f"{value.middle:.2f} ± {(value.high - value.low) / 2:.2f}"


def _beside(row: Row, key: str, name_key: str) -> str:
    value = row.to.get(key)
    return "" if value is None else f"{value.middle:.2f} ({row.extra[name_key]})"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}×"
