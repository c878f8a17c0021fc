"""Run PEFT's own tests over ``MoLoraConfig``; ``python tests/peft_contract/run.py`` records what passes.

In a process of its own: offline, with the tiny models of ``tiny_hub.py`` for the Hub's cache, and with
``plugin.py``, which puts our config in the place of PEFT's.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))

from peft_contract import tiny_hub  # noqa: E402
from peft_contract.fetch import cache, fetch, suite  # noqa: E402

EXPERTS = ("trainable", "frozen")
MODULES = (
    "decoder_models",
    "encoder_decoder_models",
    "feature_extraction_models",
    "seq_classifier",
    "token_classification_qa",
    "custom_models",
    "config",
)
PASSES = HERE / "passes.txt"


@dataclass(frozen=True)
class Results:
    """How one run ended.

    Attributes:
        passed: how many cases of each test passed, by "module::test".
        failed: names of cases that did not.
        log: what pytest said.
    """

    passed: dict[str, int]
    failed: list[str]
    log: str


def run(experts: str, scratch: Path, *arguments: str) -> Results:
    """PEFT's tests with experts that are "trainable" or "frozen".

    Args:
        experts: which.
        scratch: an empty folder.
        arguments: further ones for pytest.
    """
    made_by = hashlib.sha256(Path(tiny_hub.__file__).read_bytes()).hexdigest()[:12]
    outcomes = scratch / "outcomes"
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(tiny_hub.make_hub(cache() / f"hub-{made_by}")),
        "HF_HUB_OFFLINE": "1",
        "PEFT_CONTRACT_EXPERTS": experts,
        "PEFT_CONTRACT_OUTCOMES": str(outcomes),
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parents[1])]),
    }
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):
        environment.pop(name, None)
    modules = [f"tests/test_{name}.py" for name in MODULES]
    options = [
        "-c",
        os.devnull,
        "--rootdir",
        ".",
        "-p",
        "peft_contract.plugin",
        "-p",
        "no:cacheprovider",
        "-q",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-W", "ignore", "--tb=short", *modules, *arguments],
        cwd=suite(), env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    ended = [line.split(" ", 1) for line in outcomes.read_text().splitlines()] if outcomes.exists() else []
    passed = Counter(name.partition("[")[0] for outcome, name in ended if outcome == "passed")
    failed = [name.strip() for outcome, name in ended if outcome == "failed"]
    return Results(dict(passed), failed, done.stdout[-6000:] + done.stderr[-2000:])


def recorded() -> dict[str, dict[str, int]]:
    """The counts that are committed, by setting and test."""
    rows = [line.split() for line in PASSES.read_text().splitlines() if line and not line.startswith("#")]
    return {
        experts: {name: int(counts[column]) for name, *counts in rows if counts[column] != "-"}
        for column, experts in enumerate(EXPERTS)
    }


def main() -> None:
    """Run both settings and write down what passes."""
    fetch()
    found = {}
    for experts in EXPERTS:
        with tempfile.TemporaryDirectory() as scratch:
            results = run(experts, Path(scratch))
        print(results.log, *results.failed, sep="\n")
        found[experts] = results.passed
    names = sorted(set().union(*found.values()))
    width = max(map(len, names))
    lines = [
        f"# How many cases of each of PEFT's own tests pass, with experts that are {' and '.join(EXPERTS)}."
    ]
    for name in names:
        counts = "".join(f"{found[experts].get(name, '-'):>5}" for experts in EXPERTS)
        lines.append(f"{name:<{width}}{counts}")
    PASSES.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
