"""The bake-off on real text: six LoRA experts of equal rank on one small base, by loss.

    PEFT_MOE_DATA=../shared/data bash recipes/text/run.sh          # trains base and experts, once
    python benchmarks/bakeoff_text.py --runs runs/text --out runs/bakeoff_text
    python benchmarks/bakeoff_text.py --runs runs/text --out runs/bakeoff_text --set "seeds=[0, 1, 2]"

`general` has no expert; routers train on it as text of no expert. `science` has no expert and stays unseen.
The script writes the settings, and then runs `peft-moe bakeoff <out>/bakeoff.yaml --out <out>`. A second run
continues an interrupted one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import yaml

EXPERTS = ("math", "code", "medicine", "law", "german", "french")


def write_settings(runs: Path, out: Path) -> Path:
    settings = {
        "base": str((runs / "base").resolve()),
        "experts": {name: str((runs / name).resolve()) for name in EXPERTS},
        "domains": str((runs / "data").resolve()),
        "unseen": ["science"],
        "texts": {"train_records": 150, "test_records": 40, "mixed_per_pair": 2, "mixed_chars": 300},
        "train": {"steps": 100, "batch_size": 8, "learning_rate": 5.0e-3, "max_length": 256, "bf16": True},
        # Six experts had 500 steps of 4 texts each; width.steps=3000 is the same, and takes most of an hour.
        "width": {"steps": 0, "batch_size": 4, "learning_rate": 2.0e-3},
        "score": {"measures": ["loss"], "batch_size": 16, "max_length": 512},
    }
    path = out / "bakeoff.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/text"))
    parser.add_argument("--out", type=Path, default=Path("runs/bakeoff_text"))
    args, rest = parser.parse_known_args()
    if not (args.runs / "base").exists():
        raise SystemExit(f"No base in {args.runs}. Train it first: PEFT_MOE_DATA=… bash recipes/text/run.sh")
    args.out.mkdir(parents=True, exist_ok=True)
    path = write_settings(args.runs, args.out)
    command = [sys.executable, "-c", "from peft_moe.cli.main import run; run()", "bakeoff"]
    raise SystemExit(subprocess.call([*command, str(path), "--out", str(args.out), *rest]))


if __name__ == "__main__":
    main()
