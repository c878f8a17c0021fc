"""The bake-off on the demo's base and its five experts of unequal ranks, by exact answers and by loss.

    python benchmarks/bakeoff_demo.py --out runs/bakeoff_demo                  # every method, one seed
    python benchmarks/bakeoff_demo.py --out runs/bakeoff_demo --set "seeds=[0, 1, 2]"

The script writes the demo's questions as JSON lines and a settings file, and then runs
`peft-moe bakeoff <out>/bakeoff.yaml --out <out>`. A second run continues an interrupted one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import yaml

from peft_moe.cli.demo import BASE_NAME, asset_path
from peft_moe.cli.demo.skills import BASE_SKILLS_HELD_OUT, BASE_SKILLS_SEEN, EXPERTS, generate, write_jsonl

GENERIC, UNSEEN = "base's skills", "unseen skills"
TRAIN, TEST = 5000, 100


def write_settings(out: Path, train: int = TRAIN, test: int = TEST) -> Path:
    """Write questions and settings. The seeds of the draws are fixed: a second run has the same texts."""
    data = out / "data"
    for name in EXPERTS:
        _write(data / name, [name], train, test)
    _write(data / GENERIC, BASE_SKILLS_SEEN, train, test)
    _write(data / UNSEEN, BASE_SKILLS_HELD_OUT, 0, test)
    settings = {
        "base": str(asset_path(BASE_NAME)),
        "experts": {name: str(asset_path(f"experts/{name}")) for name in EXPERTS},
        "domains": str(data.resolve()),
        "texts": {
            "train_records": 150,
            "generic_records": 150 * len(EXPERTS),  # as many of the base's skills as of all experts together
            "test_records": test,
            "mixed_per_pair": 5,
        },
        "train": {"steps": 150, "batch_size": 32, "learning_rate": 1.0e-2, "max_length": None},
        # Each expert had 500 steps of 2,048 tokens; half of a step was about 32 questions of its own skill.
        # The same number for all five experts is width.steps=2500, which takes an hour.
        "width": {"steps": 0, "batch_size": 32, "learning_rate": 2.0e-3},
        "score": {"measures": ["exact", "loss"], "batch_size": 64, "max_length": None},
    }
    path = out / "bakeoff.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return path


def _write(folder: Path, skills: tuple[str, ...] | list[str], train: int, test: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, count, seed in (("train", train, 0), ("test", test, 1000)):
        per_skill = -(-count // len(skills))
        samples = [s for name in skills for s in generate(name, per_skill, seed, split)]
        if samples:
            write_jsonl(folder / f"{split}.jsonl", samples)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bakeoff_demo"))
    args, rest = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", "from peft_moe.cli.main import run; run()", "bakeoff"]
    path = write_settings(args.out)
    raise SystemExit(subprocess.call([*command, str(path), "--out", str(args.out), *rest]))


if __name__ == "__main__":
    main()
