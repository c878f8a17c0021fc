"""Keep a bake-off's results under benchmarks/results, and the tables of ROUTERS.md in step with them.

    python benchmarks/publish_bakeoff.py runs/bakeoff_demo demo   # keeps JSON, CSV, picture and a page
    python benchmarks/publish_bakeoff.py                             # only write ROUTERS.md anew

The newest results of a name count. A test fails while ROUTERS.md says anything else.
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
    """The latest kept results of a bake-off."""
    path = max(RESULTS.glob(f"*-bakeoff-{name}.json"))
    return path, json.loads(path.read_text(encoding="utf-8"))


def percent(estimate: dict[str, float], interval: bool = False) -> str:
    """A share of the oracle's gain, in %."""
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    return f"{value:.0f} [{low:.0f}, {high:.0f}]" if interval and low != high else f"{value:.0f}"


def change(estimate: dict[str, float]) -> str:
    """A change against the base in %, or as a factor where the base hardly errs."""
    value = estimate["value"]
    return f"×{1 + value:,.0f}" if value > 10 else f"{100 * value:+.1f}"


def ranked(methods: dict[str, Any]) -> list[str]:
    """References as they come, then methods, the best first."""
    first = [name for name, one in methods.items() if one["group"] == "reference"]
    others = [name for name in methods if name not in first]
    return first + sorted(others, key=lambda name: -_sortable(methods[name]["shares"][MEAN]["value"]))


def _sortable(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def table(measure: str, methods: dict[str, Any]) -> list[str]:
    """All methods under one measure, as Markdown."""
    rows = methods["base"]
    mixed = [row for row in (MARKED, RUNNING) if row in rows["shares"]]
    experts = [row for row in rows["shares"] if row not in (MEAN, *mixed)]
    heads = [*experts, "mean [95 %]", "behind the best", *mixed, *(f"{row}*" for row in rows["changes"])]
    lines = [
        "| method | group | seeds | " + " | ".join(heads) + " | trained | seconds |",
        "|---|---|---:|" + "---:|" * (len(heads) + 2),
    ]
    for name in ranked(methods):
        one = methods[name]
        gap = one.get("behind_best")
        sure = gap is not None and (gap["low"] > 0 or gap["high"] < 0)
        cells = [
            *(percent(one["shares"][row]) for row in experts),
            percent(one["shares"][MEAN], interval=True),
            "" if one["group"] == "reference" or gap is None else percent(gap) + (" †" if sure else ""),
            *(percent(one["shares"][row], interval=row == RUNNING) for row in mixed),
            *(change(e) for e in one["changes"].values()),
            f"{one['cost']['trainable']:,}" if one["cost"]["trainable"] else "–",
            f"{one['cost']['seconds']:.0f}",
        ]
        lines.append(f"| `{name}` | {one['group']} | {one['seeds']} | " + " | ".join(cells) + " |")
    unit = "% of the base's loss" if measure == "loss" else "points of exact answers"
    return [
        f"Share of the oracle's gain over the base, in %, by {measure}; * no expert: change in {unit}; "
        "† significant (the paired 95 % interval leaves zero out).",
        "",
        *lines,
    ]


def page(name: str, results: dict[str, Any]) -> str:
    """The results as a document."""
    settings = results["settings"]
    lines = [f"# Bake-off: {name}", "", f"![shares]({Path(results['picture']).name})", ""]
    for measure, methods in results["measures"].items():
        lines += [*table(measure, methods), ""]
    lines += [f"- {line}" for line in results["advice"]]
    if results["notes"]:
        lines += ["", "Not in the table:", "", *(f"- `{m}`: {note}" for m, note in results["notes"].items())]
    kept = {key: settings[key] for key in ("seeds", "texts", "train", "width", "score") if key in settings}
    lines += ["", "Settings:", "", "```json", json.dumps(kept, indent=1), "```", ""]
    return "\n".join(lines)


def publish(out: Path, name: str) -> None:
    """Copy a bake-off's files, without the paths of this machine."""
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
    """The methods of both bake-offs side by side, in the order of what they keep of real text."""
    (demo_path, demo), (text_path, text) = newest("demo"), newest("text")
    exact, by_loss, real = demo["measures"]["exact"], demo["measures"]["loss"], text["measures"]["loss"]
    everyone = [name for name in ranked(real) if real[name]["group"] != "reference"]
    everyone += [name for name in ranked(exact) if exact[name]["group"] != "reference" and name not in real]
    lines = [
        "| method | effort | demo: exact | by loss | behind a switch | no expert* "
        "| real text: by loss | weakest domain | behind a switch | no expert* |",
        "|---|---|" + "---:|" * 8,
    ]
    for name in everyone:
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
    return "\n".join([*lines, "", f"From {paths}, where intervals, single domains and costs stand."])


def _text_cells(one: dict[str, Any]) -> list[str]:
    shares = one["shares"]
    weakest = min(e["value"] for row, e in shares.items() if row not in (MEAN, MARKED, RUNNING))
    return [
        percent(shares[MEAN], interval=True),
        f"{100 * weakest:.0f}",
        percent(shares[RUNNING]),
        _worst(one["changes"], lowest=False),
    ]


def _worst(changes: dict[str, Any], lowest: bool) -> str:
    # Fewer exact answers are worse, and so is more loss.
    pick = min if lowest else max
    return change(pick(changes.values(), key=lambda e: e["value"]))


def write_page() -> None:
    """Both generated parts of ROUTERS.md, between their marks."""
    text = PAGE.read_text(encoding="utf-8")
    for mark, made in (("scores", scores()), ("catalogue", as_markdown(catalogue()))):
        begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
        head, rest = text.split(begin)
        text = head + begin + made.strip() + "\n" + end + rest.split(end)[1]
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?", help="a bake-off's folder")
    parser.add_argument("name", nargs="?", help="what it is called")
    args = parser.parse_args()
    if args.out is not None:
        if args.name is None:
            parser.error("give the results a name")
        publish(args.out, args.name)
    write_page()


if __name__ == "__main__":
    main()
