"""The machine of a run: versions, commit, processor, and the peak rates that floors are computed from."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

REPO = Path(__file__).parents[2]
PACKAGES = ("torch", "peft", "transformers", "peft-moe")


@dataclass(frozen=True)
class Peaks:
    """Peak rates of one thread: products in FLOP/s by dtype, and memory traffic in bytes/s."""

    flops: dict[torch.dtype, float]
    bytes: float

    def __str__(self) -> str:
        products = ", ".join(f"{str(d)[6:]} {value / 1e9:.0f} GFLOP/s" for d, value in self.flops.items())
        return f"{products}, memory {self.bytes / 1e9:.1f} GB/s"


def measure_peaks(size: int = 1024, megabytes: int = 128) -> Peaks:
    """Measure the best of a few large products, and of a few large copies (bytes read + written)."""
    flops = {}
    for dtype in (torch.bfloat16, torch.float32):
        left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        flops[dtype] = 2 * size**3 / _best(lambda a=left, b=right: a @ b)
    source = torch.ones(megabytes * 2**20, dtype=torch.uint8)
    target = torch.empty_like(source)
    return Peaks(flops, 2 * source.numel() / _best(lambda: target.copy_(source)))


def processor() -> str:
    """Return the processor's model name, as the system reports it."""
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return match[1].strip() if match else platform.processor() or platform.machine()


def machine_name() -> str:
    """Return processor and cores, for file names."""
    words = re.sub(r"[^a-z0-9]+", "-", processor().lower()).strip("-")
    return f"{words}-{os.cpu_count()}-cores"


def versions() -> dict[str, str]:
    """Return the versions of Python and the packages, and the commit, marked if files differ from it."""
    packages = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {
        **packages,
        "commit": (_git("rev-parse", "--short", "HEAD") or "?") + (" + changes" if changed else ""),
    }


def in_fresh_process(module: str, words: list[str]) -> dict[str, Any]:
    """Run ``python -m module words`` in a fresh process and parse its last line as JSON.

    Raises:
        RuntimeError: it failed; the message ends with its error output.
    """
    command = [sys.executable, "-W", "ignore", "-m", module, *words]
    process = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"{module} {' '.join(words)}: {process.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=REPO, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _best(run, repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return min(times)
