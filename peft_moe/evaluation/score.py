"""Teacher-forced scoring of answers.

An answer is exactly matched if every one of its tokens is the most likely one after the tokens
before it; for greedy decoding that is the same as generating it.

Letters: B batch, T sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import PeftMoeError
from ..routing.context import routing_inputs

Text = Sequence[tuple[str, str]]
"""Turns of (prompt, completion), one after another."""


@dataclass
class TurnScore:
    """How one answer was predicted.

    Attributes:
        nll: summed negative log-likelihood of its tokens, in nats.
        tokens: how many tokens it has.
        exact: whether all of them were the most likely ones.
    """

    nll: float
    tokens: int
    exact: bool


@dataclass
class _Row:
    ids: list[int]
    turn: list[int]  # of each token: the number of the turn whose completion it belongs to, -1 in prompts
    turns: int


def score_texts(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    batch_size: int = 64,
    max_length: int | None = None,
    turns_marked: bool = True,
) -> list[list[TurnScore]]:
    """Score the completions of all texts.

    Args:
        model: any causal language model, with adapters or without; left in its mode.
        tokenizer: a fast one (offsets tell prompt from completion); its padding is excluded.
        texts: each a list of turns (prompt, completion).
        batch_size: texts per pass; texts of similar length go together.
        max_length: tokens to keep of each text; None keeps all.
        turns_marked: a router that decides once per prompt decides anew at every turn, from that
            turn's prompt alone. False marks only the first turn's prompt, as in a running text that
            changes its subject.

    Returns:
        For each text, in order, one :class:`TurnScore` per turn. A turn cut off by ``max_length`` has
        0 tokens.
    """
    rows = [_encode(text, tokenizer, max_length) for text in texts]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    scores: list[list[TurnScore]] = [[] for _ in rows]
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = [rows[index] for index in chosen]
            for index, turns in zip(chosen, _score_batch(model, batch, turns_marked), strict=True):
                scores[index] = turns
    finally:
        model.train(was_training)
    return scores


def _encode(text: Text, tokenizer: Any, max_length: int | None) -> _Row:
    whole, spans = "", []
    for prompt, completion in text:
        begin = len(whole) + len(prompt)
        whole += prompt + completion
        spans.append((begin, len(whole)))
    if not getattr(tokenizer, "is_fast", False):
        raise PeftMoeError(f"{type(tokenizer).__name__} is a slow tokenizer; load it with use_fast=True")
    encoded = tokenizer(whole, return_offsets_mapping=True)
    turn = []
    for begin, end in encoded["offset_mapping"]:
        owner = -1
        for number, (first, last) in enumerate(spans):
            # A token that straddles the border began in the prompt.
            if end > begin and first <= begin < last:
                owner = number
        turn.append(owner)
    return _Row(encoded["input_ids"][:max_length], turn[:max_length], len(text))


def _score_batch(model: nn.Module, batch: list[_Row], turns_marked: bool) -> Iterator[list[TurnScore]]:
    device = next(model.parameters()).device
    ids_BT, turn_BT, mask_BT = (t.to(device) for t in _pad(batch))
    prompt_BT = mask_BT.bool() & (turn_BT < 0)
    if not turns_marked:
        prompt_BT &= (turn_BT >= 0).cumsum(-1) == 0  # nothing behind the first completion
    with torch.no_grad(), routing_inputs(prompt_mask=prompt_BT):
        logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[:, :-1].float()
    target_BT, turn_BT = ids_BT[:, 1:], turn_BT[:, 1:]
    nll_BT = functional.cross_entropy(logits_BTV.transpose(1, 2), target_BT, reduction="none")
    hit_BT = logits_BTV.argmax(-1) == target_BT
    for row, encoded in enumerate(batch):
        yield [
            _turn_score(nll_BT[row], hit_BT[row], turn_BT[row] == number) for number in range(encoded.turns)
        ]


def _turn_score(nll_T: Tensor, hit_T: Tensor, own_T: Tensor) -> TurnScore:
    return TurnScore(float(nll_T[own_T].sum()), int(own_T.sum()), bool(hit_T[own_T].all()))


def _pad(batch: list[_Row]) -> tuple[Tensor, Tensor, Tensor]:
    length = max(len(row.ids) for row in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    turn = torch.full((len(batch), length), -1)
    mask = torch.zeros(len(batch), length, dtype=torch.long)
    for number, row in enumerate(batch):
        size = len(row.ids)
        ids[number, :size] = torch.tensor(row.ids)
        turn[number, :size] = torch.tensor(row.turn)
        mask[number, :size] = 1
    return ids, turn, mask
