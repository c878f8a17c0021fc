"""Publish a bake-off's results under benchmarks/results, and update the tables of ROUTERS.md from them.

    python benchmarks/publish_bakeoff.py runs/bakeoff_demo demo   # writes JSON, CSV, plot and a page
    python benchmarks/publish_bakeoff.py                             # only updates ROUTERS.md

ROUTERS.md shows the newest results of each name. A test fails while its catalogue is out of date.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import shutil
from pathlib import Path
from typing import Any

from peft_moe.cli.commands.routers import as_markdown, catalogue

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "ROUTERS.md"
MARKED, RUNNING = "two domains, marked", "two domains, running"
MEAN = "mean"


def newest(name: str) -> tuple[Path, dict[str, Any]]:
    """Return the newest published results of a bake-off, with their path."""
    path = max(RESULTS.glob(f"*-bakeoff-{name}.json"))
    return path, json.loads(path.read_text(encoding="utf-8"))


def percent(estimate: dict[str, float], interval: bool = False) -> str:
    """Format a share of the oracle's gain, in %."""
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    return f"{value:.0f} [{low:.0f}, {high:.0f}]" if interval and low != high else f"{value:.0f}"


def change(estimate: dict[str, float]) -> str:
    """Format a change against the base in %, or as a factor where the base's loss is near 0."""
    value = estimate["value"]
    return f"×{1 + value:,.0f}" if value > 10 else f"{100 * value:+.1f}"


def ranked(methods: dict[str, Any]) -> list[str]:
    """Return the references in their order, then the other methods, the best first."""
    references = [name for name, result in methods.items() if result["group"] == "reference"]
    others = [name for name in methods if name not in references]
    return references + sorted(others, key=lambda name: -_sortable(methods[name]["shares"][MEAN]["value"]))


def _sortable(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def table(measure: str, methods: dict[str, Any]) -> list[str]:
    """Return a Markdown table of all methods under one measure."""
    rows = methods["base"]
    mixed = [row for row in (MARKED, RUNNING) if row in rows["shares"]]
    experts = [row for row in rows["shares"] if row not in (MEAN, *mixed)]
    heads = [*experts, "mean [95 %]", "behind the best", *mixed, *(f"{row}*" for row in rows["changes"])]
    lines = [
        "| method | group | seeds | " + " | ".join(heads) + " | trained | seconds |",
        "|---|---|---:|" + "---:|" * (len(heads) + 2),
    ]
    for name in ranked(methods):
        result = methods[name]
        gap = result.get("behind_best")
        significant = gap is not None and (gap["low"] > 0 or gap["high"] < 0)
        cells = [
            *(percent(result["shares"][row]) for row in experts),
            percent(result["shares"][MEAN], interval=True),
            "" if gap is None or result["group"] == "reference" else percent(gap) + " †" * significant,
            *(percent(result["shares"][row], interval=row == RUNNING) for row in mixed),
            *(change(e) for e in result["changes"].values()),
            f"{result['cost']['trainable']:,}" if result["cost"]["trainable"] else "–",
            f"{result['cost']['seconds']:.0f}",
        ]
        lines.append(f"| `{name}` | {result['group']} | {result['seeds']} | " + " | ".join(cells) + " |")
    unit = "% of the base's loss" if measure == "loss" else "points of exact answers"
    return [
        f"Share of the oracle's gain over the base, in %, by {measure}; * no expert: change in {unit}; "
        "† significant (the paired 95 % interval excludes zero).",
        "",
        *lines,
    ]


def page(name: str, results: dict[str, Any]) -> str:
    """Return the results as a Markdown page."""
    settings = results["settings"]
    lines = [f"# Bake-off: {name}", "", f"![shares]({Path(results['picture']).name})", ""]
    for measure, methods in results["measures"].items():
        lines += [*table(measure, methods), ""]
    lines += [f"- {line}" for line in results["advice"]]
    if results["notes"]:
        lines += ["", "Not in the table:", "", *(f"- `{m}`: {note}" for m, note in results["notes"].items())]
    budgets = {key: settings[key] for key in ("seeds", "texts", "train", "width", "score") if key in settings}
    lines += ["", "Settings:", "", "```json", json.dumps(budgets, indent=1), "```", ""]
    return "\n".join(lines)


def publish(out: Path, name: str) -> None:
    """Copy a bake-off's files to the results, without this machine's paths."""
    stem = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}-bakeoff-{name}"
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    for key in ("base", "experts", "domains"):
        results["settings"].pop(key, None)
    results["picture"] = f"{stem}.png"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{stem}.json").write_text(json.dumps(results) + "\n", encoding="utf-8")
    for kind in ("csv", "png"):
        shutil.copyfile(out / f"results.{kind}", RESULTS / f"{stem}.{kind}")
    (RESULTS / f"{stem}.md").write_text(page(name, results), encoding="utf-8")


def scores() -> str:
    """Return a table of the methods of both bake-offs, in the order of their share on real text."""
    (demo_path, demo), (text_path, text) = newest("demo"), newest("text")
    exact, by_loss, real = demo["measures"]["exact"], demo["measures"]["loss"], text["measures"]["loss"]
    methods = [name for name in ranked(real) if real[name]["group"] != "reference"]
    methods += [name for name in ranked(exact) if exact[name]["group"] != "reference" and name not in real]
    lines = [
        "| method | effort | demo: exact | by loss | after a switch | no expert* "
        "| real text: by loss | weakest domain | after a switch | no expert* |",
        "|---|---|" + "---:|" * 8,
    ]
    for name in methods:
        cells = [(exact.get(name) or real[name])["group"]]
        cells += (
            [
                percent(exact[name]["shares"][MEAN]),
                percent(by_loss[name]["shares"][MEAN]),
                percent(by_loss[name]["shares"][RUNNING]),
                _worst(exact[name]["changes"], lowest=True),
            ]
            if name in exact
            else ["–"] * 4
        )
        cells += _text_cells(real[name]) if name in real else ["–"] * 4
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    paths = " and ".join(f"[{p.stem}](benchmarks/results/{p.stem}.md)" for p in (demo_path, text_path))
    return "\n".join([*lines, "", f"From {paths}, which also show intervals, single domains and costs."])


def _text_cells(result: dict[str, Any]) -> list[str]:
    shares = result["shares"]
    weakest = min(e["value"] for row, e in shares.items() if row not in (MEAN, MARKED, RUNNING))
    return [
        percent(shares[MEAN], interval=True),
        f"{100 * weakest:.0f}",
        percent(shares[RUNNING]),
        _worst(result["changes"], lowest=False),
    ]


def _worst(changes: dict[str, Any], lowest: bool) -> str:
    # For exact answers the lowest change is the worst, for losses the highest.
    worst = min if lowest else max
    return change(worst(changes.values(), key=lambda e: e["value"]))


def write_page() -> None:
    """Update both generated parts of ROUTERS.md, between their markers."""
    text = PAGE.read_text(encoding="utf-8")
    for mark, part in (("scores", scores()), ("catalogue", as_markdown(catalogue()))):
        begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
        head, rest = text.split(begin)
        text = head + begin + part.strip() + "\n" + end + rest.split(end)[1]
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?", help="a bake-off's folder")
    parser.add_argument("name", nargs="?", help="name of the results")
    args = parser.parse_args()
    if args.out is not None:
        if args.name is None:
            parser.error("give the results a name")
        publish(args.out, args.name)
    write_page()


if __name__ == "__main__":
    main()
