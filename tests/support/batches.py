"""Batches with known real tokens, padded on either side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .bases import ARCHITECTURES, PAD, VOCAB

IGNORE = -100


def texts(seed: int = 0, lengths: tuple[int, ...] = (9, 6)) -> list[Tensor]:
    """Token rows of these lengths, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]


def pad(rows: list[Tensor], side: str = "right", extra: int = 0) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` [B, T], T the longest row plus ``extra``."""
    length = max(len(row) for row in rows) + extra
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[index, place], mask[index, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def batch_for(architecture: str, rows: list[Tensor], side: str = "right", extra: int = 0) -> dict[str, Any]:
    """A call of ``architecture`` on these texts; positions count real tokens only."""
    kind = ARCHITECTURES[architecture].kind
    batch: dict[str, Any] = pad(rows, side, extra)
    if kind == "seq2seq":
        batch["decoder_input_ids"] = torch.stack([torch.arange(4, 9) + len(row) % 5 for row in rows])
    else:
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    return batch


def labels_for(architecture: str, batch: dict[str, Any]) -> Tensor:
    """Something to learn from: next tokens behind a prompt of three, or a class per token."""
    kind = ARCHITECTURES[architecture].kind
    if kind == "encoder":
        return (batch["input_ids"] % 3).masked_fill(batch["attention_mask"] == 0, IGNORE)
    if kind == "seq2seq":
        return batch["decoder_input_ids"].roll(-1, dims=1)
    positions = batch["attention_mask"].cumsum(-1)
    ignored = (batch["attention_mask"] == 0) | (positions <= 3)
    return batch["input_ids"].masked_fill(ignored, IGNORE)


def logits_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Logits without gradients."""
    with torch.no_grad():
        return model(**batch).logits


def real_logits(architecture: str, model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    """Logits at the real tokens of each row, one tensor per row."""
    logits = logits_of(model, batch)
    if ARCHITECTURES[architecture].kind == "seq2seq":
        return list(logits)  # the decoder's rows are of equal length
    return [row[mask.bool()] for row, mask in zip(logits, batch["attention_mask"], strict=True)]
