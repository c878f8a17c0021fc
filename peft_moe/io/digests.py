"""SHA-256 digests of files and of a mixture's tensors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor

_CHUNK_BYTES = 1 << 20


def file_sha256(path: str) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def file_digest(folder: str | os.PathLike[str], part: str) -> str | None:
    """Return the digest of a mixture's weights in a folder, see :func:`tensors_digest`; None without weights.

    Args:
        folder: the mixture's.
        part: "routers" or "all".
    """
    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return None
    with safe_open(str(path), framework="pt", device="cpu") as file:
        names = sorted(key for key in file.keys() if belongs(key, part))  # noqa: SIM118  (not a dict)
        return tensors_digest(part, ((name, file.get_tensor(name)) for name in names))


def belongs(key: str, part: str) -> bool:
    """Whether a tensor is in a mixture's ``part``: "routers", or "all" of it."""
    return ".molora_router." in key if part == "routers" else ".molora_" in key


def tensors_digest(part: str, tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the part, the dtypes, a colon, and one SHA-256 over names, dtypes, shapes and bytes.

    Args:
        part: "routers" or "all"; see :func:`belongs`.
        tensors: names as in a saved file, in their order, and values.

    Returns:
        None if there are no tensors, or one is not fully in memory.
    """
    digest, dtypes = hashlib.sha256(), set()
    for name, tensor in tensors:
        if tensor.is_meta or hasattr(tensor, "to_local"):
            return None
        value, dtype = tensor.detach().contiguous().cpu(), str(tensor.dtype).removeprefix("torch.")
        dtypes.add(dtype)
        digest.update(f"{name} {dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return f"{part} {'+'.join(sorted(dtypes))}:{digest.hexdigest()}" if dtypes else None
