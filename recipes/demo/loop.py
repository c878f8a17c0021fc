"""The training loop of the demo's base and experts."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from rows import Rows
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

LENGTHS = (96, 288)  # one question or two from the start of a text, and many in a row


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    steps: int
    learning_rate: float
    warmup: int
    weight_decay: float
    tokens_per_step: int


def train(model: nn.Module, rows: Rows, plan: Schedule, name: str) -> None:
    """AdamW with warm-up and a cosine; the loss is weighted per token by the rows."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, plan.learning_rate, betas=(0.9, 0.98), weight_decay=plan.weight_decay
    )
    warm = lr_scheduler.LinearLR(optimizer, 1 / plan.warmup, total_iters=plan.warmup)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, plan.steps - plan.warmup)
    schedule = lr_scheduler.SequentialLR(optimizer, [warm, cosine], [plan.warmup])
    model.train()
    start = time.time()
    for step in range(plan.steps):
        length = LENGTHS[step % len(LENGTHS)]
        ids, weights = rows(plan.tokens_per_step // length, length)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == plan.steps - 1:
            print(f"{name} step {step} loss {loss:.4f} {time.time() - start:.0f} s", flush=True)
