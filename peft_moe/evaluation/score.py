"""Teacher-forced scoring: loss, exact match, and a method's share of the oracle's gain.

An answer matches exactly if every one of its tokens is the most likely token after the tokens before it.
For greedy decoding this is the same as generating the answer.

Letters: B batch, T sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import PeftMoeError
from ..routing.context import routing_inputs

Text = Sequence[tuple[str, str]]
"""The turns of a text in order, each as (prompt, completion)."""


@dataclass
class TurnScore:
    """How well one answer was predicted.

    Attributes:
        nll: summed negative log-likelihood of the answer's tokens, in nats.
        tokens: number of tokens in the answer.
        exact: whether every token was the most likely one.
    """

    nll: float
    tokens: int
    exact: bool


@dataclass
class Score:
    """The score of one method on one domain.

    Attributes:
        loss: mean negative log-likelihood per answer token, in nats.
        accuracy: share of answers that match exactly.
        answers: number of scored answers.
    """

    loss: float
    accuracy: float
    answers: int

    def to_dict(self) -> dict[str, float]:
        """Return the fields as plain data for JSON."""
        return asdict(self)


def summarise(turns: Iterable[TurnScore]) -> Score:
    """Average over answers; the loss is per token. Turns without tokens (cut off) do not count."""
    scored = [turn for turn in turns if turn.tokens]
    if not scored:
        return Score(float("nan"), float("nan"), 0)
    tokens = sum(turn.tokens for turn in scored)
    return Score(
        loss=sum(turn.nll for turn in scored) / tokens,
        accuracy=sum(turn.exact for turn in scored) / len(scored),
        answers=len(scored),
    )


def recovered(method: float, base: float, oracle: float) -> float:
    """Return a method's share of the oracle's gain over the base: 1 for the oracle, 0 for the base.

    The arguments are three losses or three accuracies. The share is NaN where the oracle gains nothing.
    """
    gain = oracle - base
    return (method - base) / gain if gain else float("nan")


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
        model: any causal language model, with or without adapters. Its training mode is restored.
        tokenizer: a fast tokenizer; its offsets separate prompts from completions.
        texts: each text is a list of turns (prompt, completion).
        batch_size: texts per forward pass; texts of similar length share a pass.
        max_length: tokens to keep of each text; None keeps all.
        turns_marked: with True, a router that decides once per prompt decides again at every turn, from that
            turn's prompt alone. False marks only the first turn's prompt, as in a running text whose
            subject changes.

    Returns:
        For each text, in order, one :class:`TurnScore` per turn. A turn that ``max_length`` cuts off has
        0 tokens.

    Raises:
        PeftMoeError: the tokenizer is a slow one.
    """
    rows = [_encode(text, tokenizer, max_length) for text in texts]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    scores: list[list[TurnScore]] = [[] for _ in rows]
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = [rows[index] for index in indices]
            for index, turns in zip(indices, _score_batch(model, batch, turns_marked), strict=True):
                scores[index] = turns
    finally:
        model.train(was_training)
    return scores


@dataclass
class _Row:
    ids: list[int]
    turn: list[int]  # per token: the turn whose completion it belongs to, -1 in prompts
    turns: int


def _encode(text: Text, tokenizer: Any, max_length: int | None) -> _Row:
    if not getattr(tokenizer, "is_fast", False):
        raise PeftMoeError(f"{type(tokenizer).__name__} is a slow tokenizer; load it with use_fast=True")
    full_text, completions = "", []
    for prompt, completion in text:
        begin = len(full_text) + len(prompt)
        full_text += prompt + completion
        completions.append((begin, len(full_text)))
    encoded = tokenizer(full_text, return_offsets_mapping=True)
    turn = []
    for token_begin, token_end in encoded["offset_mapping"]:
        owner = -1
        for number, (begin, end) in enumerate(completions):
            # A token that straddles the border begins in the prompt and belongs to it.
            if token_end > token_begin and begin <= token_begin < end:
                owner = number
        turn.append(owner)
    return _Row(encoded["input_ids"][:max_length], turn[:max_length], len(text))


def _score_batch(model: nn.Module, batch: list[_Row], turns_marked: bool) -> Iterator[list[TurnScore]]:
    device = next(model.parameters()).device
    ids_BT, turn_BT, mask_BT = (t.to(device) for t in _pad(batch))
    prompt_BT = mask_BT.bool() & (turn_BT < 0)
    if not turns_marked:
        prompt_BT &= (turn_BT >= 0).cumsum(-1) == 0  # only the prompt before the first completion
    with torch.no_grad(), routing_inputs(prompt_mask=prompt_BT):
        logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[:, :-1].float()
    target_BT, turn_BT = ids_BT[:, 1:], turn_BT[:, 1:]
    nll_BT = functional.cross_entropy(logits_BTV.transpose(1, 2), target_BT, reduction="none")
    hit_BT = logits_BTV.argmax(-1) == target_BT
    for row, encoded in enumerate(batch):
        yield [
            _turn_score(nll_BT[row], hit_BT[row], turn_BT[row] == number) for number in range(encoded.turns)
        ]


def _turn_score(nll_T: Tensor, hit_T: Tensor, of_turn_T: Tensor) -> TurnScore:
    return TurnScore(float(nll_T[of_turn_T].sum()), int(of_turn_T.sum()), bool(hit_T[of_turn_T].all()))


def _pad(batch: list[_Row]) -> tuple[Tensor, Tensor, Tensor]:
    length = max(len(row.ids) for row in batch)
    ids_BT = torch.zeros(len(batch), length, dtype=torch.long)
    turn_BT = torch.full((len(batch), length), -1)
    mask_BT = torch.zeros(len(batch), length, dtype=torch.long)
    for number, row in enumerate(batch):
        size = len(row.ids)
        ids_BT[number, :size] = torch.tensor(row.ids)
        turn_BT[number, :size] = torch.tensor(row.turn)
        mask_BT[number, :size] = 1
    return ids_BT, turn_BT, mask_BT
