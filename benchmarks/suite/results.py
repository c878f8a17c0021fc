"""From times to rows: one row per method of a case. Tables and JSON lines consist of rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .clock import Spread, Times, ratios, spread
from .experts import Case
from .floors import Floor
from .methods import Method

TOTAL = "LoRA E·r"
OURS = "ours"
BEST_PEER, BEST_BACKEND = "best peer", "best backend"


@dataclass
class Row:
    """One method at one point.

    Attributes:
        level: "layer", "prefill", …
        step: the timed step, for example "forward".
        method: name of the method; its key in the JSON lines is "contestant".
        peer: whether it is another project's mixture.
        milliseconds: time per call, or per token when decoding.
        to: ratios to the base, to the LoRA of the same total rank, to the best peer, to our best backend.
        floor: the shortest possible time; see `floors`.
        base_ms: median of the bare base.
        extra: numbers that only this level has.
    """

    level: str
    step: str
    case: Case
    method: str
    peer: bool = False
    milliseconds: Spread | None = None
    to: dict[str, Spread] = field(default_factory=dict)
    floor: Floor | None = None
    base_ms: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def share(self) -> float | None:
        """Return the floor as a share of the measured time; 1 is the floor itself."""
        if self.floor is None or self.milliseconds is None:
            return None
        return 1e3 * self.floor.seconds / self.milliseconds.middle

    @property
    def added_over_floor(self) -> float | None:
        """Return the time that experts and router add to the base, relative to the experts' floor."""
        if self.floor is None or self.milliseconds is None or not self.floor.added:
            return None
        return max(self.milliseconds.middle - self.base_ms, 0.0) / (1e3 * self.floor.added)

    def as_json(self) -> dict[str, Any]:
        """Return the row as a flat object, for one JSON line."""
        line = {"level": self.level, "step": self.step, "contestant": self.method, "peer": self.peer}
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
    methods: dict[str, Method],
    floor: Callable[[str], Floor],
) -> list[Row]:
    """Make the rows of one timed case, with the comparisons that its methods allow."""
    peers = [name for name in times if methods[name].peer]
    backends = [name for name in times if name.startswith(f"{OURS}, ") and "per block" not in name]
    medians = {name: spread(values).middle for name, values in times.items()}
    rows = []
    for name, values in times.items():
        row = Row(level, step, case, name, methods[name].peer, spread([1e3 * v for v in values]))
        row.to["base"] = ratios(times, name, "base")
        row.base_ms = 1e3 * medians["base"]
        if TOTAL in times:
            row.to[TOTAL] = ratios(times, name, TOTAL)
        row.floor = floor(name)
        if name.startswith(OURS) and peers:
            best = min(peers, key=medians.__getitem__)
            row.to[BEST_PEER], row.extra["best_peer"] = ratios(times, name, best), best
        if name == OURS and backends:
            best = min(backends, key=medians.__getitem__)
            row.to[BEST_BACKEND], row.extra["best_backend"] = ratios(times, name, best), best
        rows.append(row)
    return rows
