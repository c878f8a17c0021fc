"""The package mergoo, installed from the index into a cache folder.

Its composer and its model classes import names that newer versions of transformers lack. Its layer of LoRA
experts imports torch only, so that it runs beside ours. The package (LGPL-3.0) is installed without its
dependencies and used unchanged; none of its code is copied.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .methods import UnavailableError

VERSION = "0.0.10"


def package_folder() -> Path:
    """Return its folder, in ``PEFT_MOE_BENCH_CACHE`` or the user's cache."""
    cache = Path(os.environ.get("PEFT_MOE_BENCH_CACHE", Path.home() / ".cache" / "peft-moe-bench"))
    return cache / f"mergoo-{VERSION}"


def install() -> None:
    """Install the package if it is missing; only a full run of the suite does so.

    Raises:
        UnavailableError: the index cannot be reached or lacks the package.
    """
    if (package_folder() / "mergoo").is_dir():
        return
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    process = subprocess.run(
        [*command, "--target", str(package_folder()), f"mergoo=={VERSION}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if process.returncode:
        reason = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise UnavailableError(f"mergoo {VERSION} could not be installed: {reason}")


def moe_layer_class() -> Any:
    """Return ``LoRAMoeLayer`` of the installed package.

    Raises:
        UnavailableError: the package is not installed, or cannot be imported.
    """
    if str(package_folder()) not in sys.path:
        sys.path.append(str(package_folder()))
    try:
        return importlib.import_module("mergoo.compose_layers").LoRAMoeLayer
    except ImportError as error:
        raise UnavailableError(f"mergoo {VERSION} cannot be imported: {error}") from error
