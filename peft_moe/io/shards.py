"""Weights on disk as they are made: safetensors files that are written one tensor at a time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import PeftMoeError
from .checkpoint import INDEX, SINGLE
from .dtypes import FILE_WORDS
from .json_files import write_json

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Piece:
    """One tensor to be: its header is known before its numbers are made."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_size(text: str) -> int:
    """Bytes of "5GB", "200MB" or "64KB".

    Raises:
        PeftMoeError: something else, or nothing.
    """
    number, unit = text[:-2].strip(), text[-2:].upper()
    if unit in _UNITS and number.isdecimal() and int(number):
        return int(number) * _UNITS[unit]
    raise PeftMoeError(f"max_shard_size={text!r} must be a whole number with KB, MB or GB, as in '5GB'")


def write_shards(
    folder: Path, pieces: Sequence[Piece], most_bytes: int, *, progress: bool | None = None
) -> None:
    """Write tensors in their order, one in memory at a time, with an index where there is more than one file.

    Args:
        folder: an empty one.
        pieces: what is written.
        most_bytes: of one file; a tensor that is larger gets a file of its own.
        progress: whether to show a bar; None shows one on a terminal.

    Raises:
        PeftMoeError: the disk is too small, or a tensor is not what was announced, or not finite.
    """
    total, free = sum(piece.num_bytes for piece in pieces), shutil.disk_usage(folder).free
    if total > free:
        raise PeftMoeError(
            f"the export takes {total / 1e9:.1f} GB and {folder.parent} has {free / 1e9:.1f} GB left; free "
            "some, or choose another folder"
        )
    shards = _packed(pieces, most_bytes)
    count = len(shards)
    names = [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)] if count > 1 else [SINGLE]
    with tqdm(
        total=len(pieces), desc="export", unit="tensor", disable=None if progress is None else not progress
    ) as bar:
        for name, shard in zip(names, shards, strict=True):
            with open(folder / name, "wb") as file:
                _write(file, shard, bar)
    if count > 1:
        places = {piece.name: name for name, shard in zip(names, shards, strict=True) for piece in shard}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(folder / INDEX, index, indent=2, strict=True)


def _packed(pieces: Sequence[Piece], most_bytes: int) -> list[list[Piece]]:
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.num_bytes > most_bytes:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.num_bytes
    return shards


def _write(file: BinaryIO, shard: Sequence[Piece], bar: tqdm[None]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for piece in shard:
        end = start + piece.num_bytes
        header[piece.name] = {
            "dtype": FILE_WORDS[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for piece in shard:
        _write_one(file, piece)
        bar.update()


def _write_one(file: BinaryIO, piece: Piece) -> None:
    # A call of its own, so that nothing of this tensor is left when the next one is made.
    tensor = piece.make()
    if tuple(tensor.shape) != piece.shape or tensor.dtype != piece.dtype:
        raise PeftMoeError(f"{piece.name} is {tuple(tensor.shape)}, where its sizes say {piece.shape}")
    if not bool(torch.isfinite(tensor).all()):
        raise PeftMoeError(f"{piece.name} overflows in {str(piece.dtype)[6:]}; use 'bfloat16' or 'float32'")
    tensor = tensor.detach().cpu().contiguous()
    data: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    file.write(data)
