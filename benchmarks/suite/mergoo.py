"""mergoo's package from the index, in a cache folder of its own.

Its composer and its copies of models import names that newer transformers no longer have; its layer of LoRA
experts imports torch alone, and runs with ours. The package (LGPL-3.0) is installed without its
dependencies and used as it is; nothing of it is copied.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .contestants import UnavailableError

VERSION = "0.0.10"


def package_folder() -> Path:
    """Where it lies: ``PEFT_MOE_BENCH_CACHE``, or a folder of the user's cache."""
    cache = Path(os.environ.get("PEFT_MOE_BENCH_CACHE", Path.home() / ".cache" / "peft-moe-bench"))
    return cache / f"mergoo-{VERSION}"


def install() -> None:
    """Fetch the package once; only a full run of the suite does so.

    Raises:
        UnavailableError: the index cannot be reached or does not have it.
    """
    if (package_folder() / "mergoo").is_dir():
        return
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--target", str(package_folder()), f"mergoo=={VERSION}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UnavailableError(f"mergoo {VERSION} could not be installed: {reason}")


def moe_layer_class() -> Any:
    """``LoRAMoeLayer`` of the installed package.

    Raises:
        UnavailableError: it is not installed, or does not import.
    """
    if str(package_folder()) not in sys.path:
        sys.path.append(str(package_folder()))
    try:
        return importlib.import_module("mergoo.compose_layers").LoRAMoeLayer
    except ImportError as error:
        raise UnavailableError(f"mergoo {VERSION} is not there: {error}") from error
