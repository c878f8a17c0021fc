"""Fetch PEFT's sdist, pinned by version and hash, and unpack its tests under the virtual environment.

Run by ``make test``. Nothing of it is committed here.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

REQUIREMENT = Path(__file__).with_name("sdist.txt")


def pinned_version() -> str:
    """The version of PEFT whose tests are pinned.

    Raises:
        SystemExit: it is not the installed one; the pin has to follow.
    """
    pinned = re.search(r"^peft==(\S+)", REQUIREMENT.read_text(), re.MULTILINE)
    version = pinned[1] if pinned else "?"
    installed = importlib.metadata.version("peft")
    if version != installed:
        sys.exit(f"{REQUIREMENT} pins the tests of peft {version}, installed is {installed}: pin that one")
    return version


def cache() -> Path:
    """Where the tests and the tiny models that they ask for are kept."""
    return Path(sys.prefix) / "peft-tests"


def suite() -> Path:
    """The unpacked sdist of the installed PEFT, whether it is there or not."""
    return cache() / f"peft-{importlib.metadata.version('peft')}"


def fetch() -> Path:
    """Download and unpack, unless it is there.

    Raises:
        subprocess.CalledProcessError: the package index is out of reach, or sent other bytes.
    """
    name = f"peft-{pinned_version()}"
    if suite().exists():
        return suite()
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as scratch:
        command = "download --quiet --no-deps --no-binary=:all: --no-build-isolation --require-hashes"
        subprocess.run(
            [sys.executable, "-m", "pip", *command.split(), "-r", str(REQUIREMENT), "-d", scratch], check=True
        )
        with tarfile.open(Path(scratch) / f"{name}.tar.gz") as archive:
            tests = [m for m in archive.getmembers() if m.name.startswith(f"{name}/tests/")]
            # Pythons before 3.11.4 know no filters; the archive's hash is checked above.
            safely: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            archive.extractall(scratch, members=tests, **safely)
        # They import each other relatively, for which PEFT's repository has this file and the sdist has not.
        (Path(scratch) / name / "tests" / "__init__.py").touch()
        os.replace(Path(scratch) / name, suite())
    return suite()


if __name__ == "__main__":
    try:
        print(f"PEFT's own tests: {fetch()}")
        (cache() / ".fetched").touch()
    except subprocess.CalledProcessError:
        print(
            "PEFT's own tests could not be fetched from the package index; its test will be skipped",
            file=sys.stderr,
        )
        if os.environ.get("PEFT_CONTRACT") == "required":
            sys.exit(1)
