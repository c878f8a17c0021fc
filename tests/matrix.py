"""``make matrix``: install as a stranger does, with each version of transformers, and run core tests.

No constraints.txt: what the bounds in pyproject.toml allow is what is installed, but for transformers itself.
``python tests/matrix.py [version …]`` runs some; "newest" pins nothing. ``JOBS`` is the number of processes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).parents[1]
VERSIONS = ("5.16.*", "5.19.*", "5.23.*", "newest")
# Of the whole suite, what meets transformers most closely: some minutes for each version.
CORE = (
    "tests/package/test_layering.py",
    "tests/package/test_public_api.py",
    "tests/routers/test_running.py",
    "tests/conformance/test_cache_names.py",
    "tests/conformance/test_generation.py",
    "tests/conformance/test_routers.py",
    "tests/tuner/test_controls.py",
    "tests/tuner/test_loading.py",
    "tests/tuner/test_peft_lifecycle.py",
    "tests/training/test_router_gradients.py",
    "tests/tuner/test_task_heads.py",
)
SHOWN = ("transformers", "peft", "trl", "torch")


def python_of(version: str) -> Path:
    """The interpreter of a version's environment, which is brought up to date; pip's cache is shared."""
    folder = REPO / ".matrix" / version.removesuffix(".*")
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--upgrade", "--upgrade-strategy", "eager"]
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        # Torch first, as the Makefile does: everything else would otherwise pull a build of gigabytes.
        subprocess.run([*pip, "torch==2.13.0"], check=True)
    wanted = "transformers" if version == "newest" else f"transformers=={version}"
    subprocess.run([*pip, "torch==2.13.0", "-e", ".[dev]", wanted], check=True, cwd=REPO)
    return python


def installed(python: Path) -> dict[str, str]:
    """Versions of what matters in an environment."""
    script = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"
    done = subprocess.run([str(python), "-c", script, *SHOWN], capture_output=True, text=True, check=True)
    return dict(zip(SHOWN, done.stdout.split(), strict=True))


def run(version: str) -> tuple[bool, str]:
    """Install and test one version; whether it passed, and its line of the table."""
    started = time.monotonic()
    try:
        python = python_of(version)
    except subprocess.CalledProcessError as error:
        return False, f"{version:<14}not installed: pip ended with {error.returncode}"
    found = installed(python)
    marks = ["-m", "not slow and not gpu", "-n", os.environ.get("JOBS", "2")]
    done = subprocess.run(
        [str(python), "-m", "pytest", *marks, "-rfE", "--tb=short", *CORE],
        cwd=REPO, capture_output=True, text=True, check=False,
    )  # fmt: skip
    # Its environment knows what else is there; the last line that counts is pytest's summary.
    counts = re.findall(r"^=*\s*(\d+ \w+.*? in [\d.]+s.*?)\s*=*$", done.stdout, re.MULTILINE)
    if done.returncode:
        print(done.stdout[-8000:], done.stderr[-2000:], sep="\n")
    said = counts[-1] if counts else f"pytest ended with {done.returncode}"
    columns = "".join(f"{found[name]:<14}" for name in SHOWN)
    return done.returncode == 0, f"{columns}{said}, {time.monotonic() - started:.0f}s with the installation"


def main() -> int:
    """Run all, or those that are named, and print the table."""
    results = []
    for version in sys.argv[1:] or VERSIONS:
        results.append(run(version))
        print("passed" if results[-1][0] else "FAILED", results[-1][1], flush=True)
    print("\n       ", *(f"{name:<13}" for name in SHOWN))
    for passed, line in results:
        print("passed " if passed else "FAILED ", line)
    return int(not all(passed for passed, _ in results))


if __name__ == "__main__":
    sys.exit(main())
