"""Where tables are printed."""

from __future__ import annotations

import sys

from rich.console import Console


def wide_console() -> Console:
    """A console that does not squeeze tables into 80 columns where nobody said how wide it is."""
    return Console() if sys.stdout.isatty() else Console(width=160)
