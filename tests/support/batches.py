"""Batches with known real tokens, padded on either side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .bases import BASES, IMAGE, IMAGE_TOKEN, PAD, VOCAB

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
    kind, reads = BASES[architecture].kind, BASES[architecture].reads
    if reads == "pixels":
        return {"pixel_values": images_for(rows)}
    if reads == "both":
        picture = torch.full((4,), IMAGE_TOKEN)
        rows = [row.clamp_max(IMAGE_TOKEN - 1) for row in rows]
        rows = [torch.cat([row[:2], picture, row[2:]]) for row in rows]
    batch: dict[str, Any] = pad(rows, side, extra)
    if reads == "both":
        batch["pixel_values"] = images_for(rows)
    if not _takes_positions(architecture):
        return batch
    if kind == "seq2seq":
        batch["decoder_input_ids"] = torch.stack([torch.arange(4, 9) + len(row) % 5 for row in rows])
    else:
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    return batch


def images_for(rows: list[Tensor]) -> Tensor:
    """An image for each row, drawn from its numbers: [B, 3, H, W]."""
    seeds = [torch.Generator().manual_seed(int(row.sum())) for row in rows]
    return torch.stack([torch.randn(3, IMAGE, IMAGE, generator=seed) for seed in seeds])


def _takes_positions(architecture: str) -> bool:
    # Mamba has none; RoBERTa counts from its padding id, by itself.
    return architecture != "mamba" and not architecture.startswith("roberta")


def labels_for(architecture: str, batch: dict[str, Any]) -> Tensor:
    """Something to learn from: next tokens behind a prompt of three, or a class per token."""
    kind = BASES[architecture].kind
    if kind == "encoder":
        return (batch["input_ids"] % 3).masked_fill(batch["attention_mask"] == 0, IGNORE)
    if kind == "seq2seq":
        return batch["decoder_input_ids"].roll(-1, dims=1)
    positions = batch["attention_mask"].cumsum(-1)
    ignored = (batch["attention_mask"] == 0) | (positions <= 3)
    return batch["input_ids"].masked_fill(ignored, IGNORE)


def logits_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Logits without gradients; of a model without a head its hidden states."""
    with torch.no_grad():
        output = model(**batch)
    return output.logits if "logits" in output else output.last_hidden_state


def real_logits(architecture: str, model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    """Logits at the real tokens of each row, one tensor per row."""
    logits = logits_of(model, batch)
    if BASES[architecture].kind in {"seq2seq", "classifier"}:
        return list(logits)  # rows of equal length, or one answer each
    return [row[mask.bool()] for row, mask in zip(logits, batch["attention_mask"], strict=True)]
