"""The results as a JSON file without the single sentences, and as a page made from it."""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft_moe.io.json_files import write_json

from .claims import CHECK, CLAIM, FAILED, HELD, MARGIN, OPEN, judged, read_cells, seeds_of
from .plan import SYSTEMS
from .text import NONE, RIGHT, SEEN, UNSEEN, WRONG

RESULTS = Path(__file__).parents[1] / "results"
COLUMNS = [f"{domain}/{told}" for domain in SEEN for told in (RIGHT, WRONG, NONE)]
COLUMNS += [f"{UNSEEN}/{told}" for told in (WRONG, NONE)]
PACKAGES = ("torch", "peft", "transformers", "trl", "sacrebleu")


def summary(out: Path) -> dict[str, Any]:
    """What is kept of a run."""
    cells = read_cells(out)
    systems: dict[str, Any] = {}
    for name, one in SYSTEMS.items():
        done = [cells[name, seed] for seed in seeds_of(cells, name)]
        if not done:
            continue
        rows = {key: [cell["scores"][key] for cell in done] for key in done[0]["scores"]}
        systems[name] = {
            "about": one.about,
            "seeds": len(done),
            "cpu_s": round(statistics.mean(cell["all_s"] for cell in done)),
            "rows": {
                key: {
                    "loss": [round(sum(row["nll"]) / sum(row["tokens"]), 4) for row in some],
                    **{
                        part: [round(row[part], 2) for row in some]
                        for part in ("chrf", "bleu")
                        if part in some[0]
                    },
                }
                for key, some in rows.items()
            },
        }
    told = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    base = json.loads((out / "base" / "summary.json").read_text(encoding="utf-8"))
    return {
        **told,
        "versions": {name: version(name) for name in PACKAGES},
        "base": base,
        "cpu_minutes": round((base["cpu_s"] + sum(cell["all_s"] for cell in cells.values())) / 60, 1),
        "systems": systems,
        "claims": judged(cells),
    }


def spread(values: list[float], digits: int) -> str:
    """The mean, and the standard deviation over seeds where there are several."""
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def grid(systems: Mapping[str, Any], parts: Mapping[str, int]) -> list[str]:
    """A row per system, a column per domain and what was told of it; ``parts``: measures and their digits."""
    heads = [
        f"{domain}, {told}" if told != NONE else domain for domain, told in (c.split("/") for c in COLUMNS)
    ]
    lines = ["| system | seeds | " + " | ".join(heads) + " |", "|---|---:|" + "---:|" * len(heads)]
    for name, one in systems.items():
        cells = [
            " / ".join(spread(one["rows"][column][part], digits) for part, digits in parts.items())
            if parts.keys() <= one["rows"].get(column, {}).keys()
            else ""
            for column in COLUMNS
        ]
        lines.append(f"| `{name}` | {one['seeds']} | " + " | ".join(cells) + " |")
    return lines


def claims_table(claims: list[dict[str, Any]]) -> list[str]:
    """Claims with their verdicts, group by group."""
    lines = [
        "| claim | compared | on | difference [95 %] | to be below | chrF | verdict |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    group = None
    for one in claims:
        if one["group"] != group:
            group = one["group"]
            lines.append(f"| **{group}** | | | | | | |")
        sides = " − ".join(
            f"`{n}`" + (f" ({told})" if told != NONE else "") for n, told in (one["one"], one["other"])
        )
        if one["unit"] == "nats per token":
            figures = f"{one['value']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]"
        else:
            sides = sides.replace(" − ", " against ")
            figures = f"{one['value']:+.0%} [{one['low']:+.0%}, {one['high']:+.0%}] of the time"
        chrf = "" if one["chrf"] is None else f"{one['chrf']:+.1f}"
        text = one["text"] if one["role"] == CLAIM else f"{one['role']}: {one['text']}"
        cells = [text, sides, ", ".join(one["domains"]), figures, f"{one['margin']:g}", chrf]
        lines.append("| " + " | ".join(cells) + f" | **{one['verdict']}** |")
    return lines


def plainly(claims: list[dict[str, Any]]) -> list[str]:
    """One line per claim of the paper: whether all that it says held, or which part."""
    lines = []
    for group in dict.fromkeys(one["group"] for one in claims):
        own = [one for one in claims if one["group"] == group and one["role"] == CLAIM]
        said = {word: [one["text"] for one in own if one["verdict"] == word] for word in (HELD, FAILED, OPEN)}
        parts = [(word, texts) for word, texts in said.items() if texts]
        if len(parts) == 1:
            said_here = f"- **{group}: {parts[0][0]}.**"
        else:
            listed = "; ".join(
                f"{word}: " + ", ".join(f"“{text}”" for text in texts) for word, texts in parts
            )
            said_here = f"- **{group}: in part.** {listed[0].upper()}{listed[1:]}."
        checks = [one for one in claims if one["group"] == group and one["role"] == CHECK]
        for one in checks:
            if one["verdict"] != HELD:
                said_here += f" But that {one['text']}: {one['verdict']}."
        lines.append(said_here)
    return lines


def page(results: dict[str, Any]) -> str:
    """The results as a document."""
    plan, pairs, base, systems = (results[key] for key in ("plan", "pairs", "base", "systems"))
    total, active = plan["experts"] * plan["rank"], plan["top_k"] * plan["rank"]
    verdicts = [one["verdict"] for one in results["claims"]]
    counts = ", ".join(f"{verdicts.count(word)} {word}" for word in (HELD, FAILED, OPEN))
    about = [f"| `{name}` | {one['about']} | {one['cpu_s']} |" for name, one in systems.items()]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return f"""# Multi-domain translation: the claims of arXiv 2407.01126, on a small scale

`python -m benchmarks.nmt`: English to French; Python's documentation (it), Canadian statutes (law) and
descriptions of shell commands (shell, the unseen domain). Chirkova et al. trained large translation models
on much more text; this asks whether what they found shows here as well.

{_joined(plainly(results["claims"]))}

Of the {len(verdicts)} lines below, {counts}.

{_joined(claims_table(results["claims"]))}

Differences are of the loss per target token, in nats, mean over the domains: below 0 the first is better. A
claim held if the whole interval is below the bound, did not hold if the whole interval is above it, and is
not decidable here otherwise. {MARGIN:g} nats count as the same level; the first line tells what training
gains at all. Intervals: paired bootstrap over sentences and seeds; each stands for itself, so that one of
this many may be wrong by chance. chrF: the same difference in points, without an interval. Times are
CPU seconds of one thread on a shared machine, with the least and the most of the seeds in place of an
interval, and less than 10 % is not believed; `benchmarks.suite` measures speed with more care.

## What was compared

| system | what it is | CPU s to train and score |
|---|---|---:|
{_joined(about)}

E = {plan["experts"]}, r = {plan["rank"]}, k = {plan["top_k"]}: {total} ranks in every system but `active`,
which has {active}; with an expert per domain each has half of them. Every system has {plan["steps"]} steps
of {plan["batch"]} pairs in all; `experts` has 80 % of them for its two LoRAs, to which `routed` adds 20 %
for the router. Generic pairs, where it says so: {plan["generic"]:.0%} of all, by `generic_share`; wrong
labels: {plan["randomised"]:.0%}, by `domain_randomisation`. Told nothing, names in the prompt say "any",
as before generic pairs, and gates that read labels mix both experts by half. The time of the LoRAs that
`experts` and `routed` share is counted once, with whichever came first.

## Loss per target token

Behind the comma stands what the system is told of the domain; without one, nothing. The unseen domain has
no label of its own: a wrong one is a seen domain's. Mean ± standard deviation over seeds.

{_joined(grid(systems, {"loss": 3}))}

## chrF / BLEU

By sacrebleu, greedy decoding. So small a model hardly translates: it writes the language of the domain and
repeats itself. What is above is then more about adapting to domains than about translating well.

{_joined(grid(systems, {"chrf": 1, "bleu": 1}))}

## Sizes and limits

- Base: a Llama by recipes/train_base.py, on {pairs["base"]:,} pairs: half of each of the three sets, that
  of shell included; {base["train_tokens"]:,} tokens, {base["steps"]} steps. It stands for a model that has
  read generic text. One base for all seeds, which change adapters, routers and the order and draw of pairs.
- Generic pairs ({pairs["generic"]:,}) are the short ones of that half. There is no Paracrawl here: what is
  generic holds the unseen domain without its name, as a crawl would, and nothing that the base has not
  read. The other half of it and law are these domains' own ({pairs["it"]:,} and {pairs["law"]:,} pairs);
  that of shell is unused.
- Pairs of at most {plan["max_chars"]} characters, both sides together; {pairs["test"]} test sentences, at
  most {plan["tests"]} of a domain.
- Two seen domains: a wrong label is the other's. English to German is left out: with another target
  language a wrong label would be more than a wrong domain.
- {results["cpu_minutes"]:g} CPU minutes of one core in all. {versions}.
"""


def _joined(lines: list[str]) -> str:
    return "\n".join(lines)


def publish(out: Path, results: Path = RESULTS) -> Path:
    """Write both files, of today; the page's path."""
    stem = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}-nmt"
    kept = json.loads(json.dumps(summary(out)))
    write_json(results / f"{stem}.json", kept, indent=1)
    path = results / f"{stem}.md"
    path.write_text(page(kept), encoding="utf-8")
    return path
