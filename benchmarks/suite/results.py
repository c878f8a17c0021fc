"""From times to rows: one row per contestant of a case, the unit of the tables and of the JSON lines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .clock import Spread, Times, ratios, spread
from .contestants import Contestant
from .experts import Case
from .floors import Floor

TOTAL = "LoRA E·r"
OURS = "ours"
BEST_PEER, BEST_BACKEND = "best peer", "best backend"


@dataclass
class Row:
    """One contestant at one point.

    Attributes:
        level: "layer", "prefill", …
        step: what was timed there.
        milliseconds: per call (per token when decoding).
        to: ratio to the base, to the LoRA of the same total rank, to the best peer, to our best backend.
        floor: the least time, see `floors`.
        base_ms: the bare base's median, for what the experts add.
        extra: numbers of one level alone.
    """

    level: str
    step: str
    case: Case
    contestant: str
    peer: bool = False
    milliseconds: Spread | None = None
    to: dict[str, Spread] = field(default_factory=dict)
    floor: Floor | None = None
    base_ms: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def share(self) -> float | None:
        """Part of the time that the necessary work must take; 1 is the floor itself."""
        if self.floor is None or self.milliseconds is None:
            return None
        return 1e3 * self.floor.seconds / self.milliseconds.middle

    @property
    def added_over_floor(self) -> float | None:
        """How many times its floor what the experts and their router add to the base takes."""
        if self.floor is None or self.milliseconds is None or not self.floor.added:
            return None
        return max(self.milliseconds.middle - self.base_ms, 0.0) / (1e3 * self.floor.added)

    def as_json(self) -> dict[str, Any]:
        """Flat, for one line."""
        line = {"level": self.level, "step": self.step, "contestant": self.contestant, "peer": self.peer}
        line["case"] = {k: v for k, v in dataclasses.asdict(self.case).items() if k != "sizes"}
        if self.milliseconds is not None:
            line["ms"] = _numbers(self.milliseconds)
        line["to"] = {name: _numbers(value) for name, value in self.to.items()}
        if self.floor is not None:
            line["floor"] = dataclasses.asdict(self.floor)
            line["share_of_floor"], line["added_over_floor"] = self.share, self.added_over_floor
        return {**line, **self.extra}


def _numbers(value: Spread) -> list[float]:
    return [round(number, 5) for number in dataclasses.astuple(value)]


def make_rows(
    level: str,
    step: str,
    case: Case,
    times: Times,
    contestants: dict[str, Contestant],
    floor: Callable[[str], Floor],
) -> list[Row]:
    """Rows of one timed case, with the comparisons that its contestants allow."""
    peers = [name for name in times if contestants[name].peer]
    backends = [name for name in times if name.startswith(f"{OURS}, ") and "per block" not in name]
    middle = {name: spread(values).middle for name, values in times.items()}
    rows = []
    for name, values in times.items():
        row = Row(level, step, case, name, contestants[name].peer, spread([1e3 * v for v in values]))
        row.to["base"] = ratios(times, name, "base")
        row.base_ms = 1e3 * middle["base"]
        if TOTAL in times:
            row.to[TOTAL] = ratios(times, name, TOTAL)
        row.floor = floor(name)
        if name.startswith(OURS) and peers:
            best = min(peers, key=middle.__getitem__)
            row.to[BEST_PEER], row.extra["best_peer"] = ratios(times, name, best), best
        if name == OURS and backends:
            best = min(backends, key=middle.__getitem__)
            row.to[BEST_BACKEND], row.extra["best_backend"] = ratios(times, name, best), best
        rows.append(row)
    return rows
