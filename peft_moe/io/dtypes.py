"""The dtypes of weights: their names in configs and commands, and their words in safetensors files."""

from __future__ import annotations

import torch

NAMED_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes that a user may ask for, by name."""
FILE_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The dtypes that can be read as a weight, by their words in safetensors files."""
FILE_WORDS = {dtype: word for word, dtype in FILE_DTYPES.items()}
"""The words in safetensors files, by dtype."""
FILE_BYTES = {word: dtype.itemsize for word, dtype in FILE_DTYPES.items()}
"""Bytes of one number, by the word in safetensors files."""


def name_of_word(word: str | None) -> str:
    """Return the name to compute in for a dtype's word in a file; "float32" for float64 and unknown words."""
    name = str(FILE_DTYPES.get(word or "", torch.float32)).removeprefix("torch.")
    return name if name in NAMED_DTYPES else "float32"
