"""Run the suite: `make bench`, or

    python -m benchmarks.suite                        # about a quarter of an hour of one core
    python -m benchmarks.suite --quick --out /tmp/b   # under a minute, tiny sizes: does everything run?
    python -m benchmarks.suite --levels layer models  # some of it

Every method is compared with the reference loop before it is timed, and a failure ends the run without any
output. Results are appended to benchmarks/results/<date>-<machine>-bench.md; beside it are a picture and a
file with one JSON line per method and point.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
import warnings
from pathlib import Path

import torch

from . import layers, loading, memory, models, picture, profile, routers
from .goals import goals
from .machine import REPO, Peaks, machine_name, measure_peaks, processor, versions
from .mergoo import install
from .methods import UnavailableError
from .parity import ParityError
from .report import tables
from .results import Row

LEVELS = ("models", "layer", "memory", "loading", "routers")


def main(words: list[str] | None = None) -> int:
    """Measure, print and save; return 1 if a method fails its parity check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes; the figures mean nothing")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=LEVELS)
    parser.add_argument("--out", type=Path, default=REPO / "benchmarks" / "results")
    args = parser.parse_args(words)
    # On a shared machine only the CPU time of one thread is a steady clock.
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    start = time.monotonic()
    if not args.quick:
        try:
            install()
        except UnavailableError as reason:
            print(reason, file=sys.stderr)  # the report then says that mergoo is left out
    peaks = measure_peaks(256, 8) if args.quick else measure_peaks()
    try:
        rows, notes = measure(args.levels, peaks, args.quick)
    except ParityError as error:
        print(f"No figures: {error}", file=sys.stderr)
        return 1
    parts = [heading(peaks, args.quick, time.monotonic() - start), *notes, tables(rows)]
    bounds: dict[str, str] = {}
    if "models" in args.levels:
        where, bounds = profile.measure(args.quick)
        parts.append(where)
    text = "\n\n".join(part for part in (*parts, "" if args.quick else goals(rows, bounds)) if part) + "\n\n"
    print(text)
    keep(args.out, text, rows, peaks)
    return 0


def measure(levels: list[str], peaks: Peaks, quick: bool) -> tuple[list[Row], list[str]]:
    """Return the rows of all levels, in the order of ``LEVELS``, and the methods left out, with reasons."""
    start = time.monotonic()
    left_out: list[str] = []

    def say(message: str) -> None:
        if " is left out: " in message:
            if message in left_out:
                return
            left_out.append(message)
        print(f"{time.monotonic() - start:6.0f} s  {message}", file=sys.stderr, flush=True)

    rows: list[Row] = []
    if "models" in levels:
        rows += models.measure(peaks, quick, say)
    if "layer" in levels:
        rows += layers.measure(peaks, quick, say)
    if "memory" in levels:
        rows += memory.measure(quick, say)
    if "loading" in levels:
        rows += loading.measure(quick, say)
    if "routers" in levels:
        rows += routers.measure(quick, say)
    return rows, left_out


def heading(peaks: Peaks, quick: bool, seconds: float) -> str:
    """Return the date, the machine, the versions and the way of measuring."""
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    kind = "Quick run: sizes too small to mean anything. " if quick else ""
    return (
        f"## Benchmark, {_now():%Y-%m-%d %H:%M} UTC\n\n{kind}{processor()}; {used}. One thread; CPU time "
        "of that thread; methods take turns within a round, short calls after an uncounted one "
        "of their own; cells are medians (lower–upper quartile) of ratios within a round. "
        f"Peaks measured here: {peaks}. Parity with the reference held for every method. "
        f"The run took {seconds / 60:.1f} minutes."
    )


def keep(folder: Path, text: str, rows: list[Row], peaks: Peaks) -> None:
    """Append the tables and the JSON lines; redraw the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{_now():%Y-%m-%d}-{machine_name()}-bench"
    drawn = picture.draw(rows, folder / f"{stem}.png")
    with (folder / f"{stem}.md").open("a", encoding="utf-8") as file:
        file.write(text + (f"![Growth with the number of experts]({stem}.png)\n\n" if drawn else ""))
    run = {
        "date": f"{_now():%Y-%m-%dT%H:%M}Z",
        "machine": machine_name(),
        "versions": versions(),
        "peaks": {**{str(d)[6:]: f for d, f in peaks.flops.items()}, "memory": peaks.bytes},
    }
    with (folder / f"{stem}.jsonl").open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**run, **row.as_json()}, ensure_ascii=False) + "\n")
    print(f"Kept in {folder / stem}.md, .jsonl{', .png' if drawn else ''}.")


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


if __name__ == "__main__":
    sys.exit(main())
