"""Checks of a saved mixture's two files before any model is touched: both are intact and fit together."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import PeftMoeError
from ...experts.spec import ExpertSpec

_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.molora_(?P<side>[AB])\.weight")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Parse a file that holds one JSON object, strictly.

    Raises:
        PeftMoeError: it cannot be read, is no JSON object, or names a key twice.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        raise PeftMoeError(f"{path} cannot be read as JSON: {error}; copy the folder again") from error
    if not isinstance(values, dict):
        raise PeftMoeError(f"{path} holds no JSON object; copy the folder again")
    return values


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse repeated keys, as an ``object_pairs_hook``; by default json silently keeps the last one."""
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} appears twice")
    return values


def check_weights_file(
    folder: str | os.PathLike[str], specs: list[ExpertSpec], *, all_everywhere: bool = True
) -> None:
    """Compare the header of a mixture's weights with its experts; a folder without weights passes.

    Args:
        folder: folder of the mixture.
        specs: the mixture's experts.
        all_everywhere: whether every layer has all experts.

    Raises:
        PeftMoeError: the file is damaged, or does not belong to these experts.
    """
    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            rows = {key: file.get_slice(key).get_shape()[:1] for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise PeftMoeError(
            f"{path} is not a sound safetensors file: {error}; copy the folder again, it may be truncated"
        ) from error
    for key, shape in rows.items():
        factor = _FACTOR.fullmatch(key)
        if factor is None:
            continue
        ranks = sum(spec.rank_in(factor["module"]) for spec in specs)
        if not shape or shape[0] > ranks or (all_everywhere and shape[0] < ranks):
            raise PeftMoeError(
                f"{path}: {key} has {list(shape)} rows, and the experts in {CONFIG_NAME} have {ranks} ranks "
                "there; weights and config are not from one save: copy the folder again"
            )


def file_digest(folder: str | os.PathLike[str], part: str) -> str | None:
    """Return the :func:`tensors_digest` of a mixture's weights in a folder; None without weights.

    Args:
        folder: folder of the mixture.
        part: "routers" or "all".
    """
    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return None
    with safe_open(str(path), framework="pt", device="cpu") as file:
        names = sorted(key for key in file.keys() if belongs(key, part))  # noqa: SIM118  (not a dict)
        return tensors_digest(part, ((name, file.get_tensor(name)) for name in names))


def belongs(key: str, part: str) -> bool:
    """Tell whether a key names a tensor of a mixture's ``part``: "routers", or "all"."""
    return ".molora_router." in key if part == "routers" else ".molora_" in key


def tensors_digest(part: str, tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the part, the dtypes, a colon, and one SHA-256 over names, dtypes, shapes and bytes.

    Args:
        part: the part that the tensors belong to, see :func:`belongs`.
        tensors: names as in a saved file, sorted, and values.

    Returns:
        None if there are no tensors, or if a tensor is empty or split between processes.
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
