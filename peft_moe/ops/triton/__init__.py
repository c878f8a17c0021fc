"""Triton kernels, and the backends that run them.

This file and :mod:`.backends` import no Triton; the kernels' files do.
"""

import os


def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"
