"""From scores of answers to what one compares: loss, accuracy, share of the oracle's gain."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from .score import TurnScore


@dataclass
class Score:
    """Of one method on one domain.

    Attributes:
        loss: mean negative log-likelihood per answer token, in nats.
        accuracy: share of answers that match exactly.
        answers: how many were scored.
    """

    loss: float
    accuracy: float
    answers: int

    def to_dict(self) -> dict[str, float]:
        """Plain data for JSON."""
        return asdict(self)


def summarise(turns: Iterable[TurnScore]) -> Score:
    """Mean over answers; the loss is per token. Turns without tokens (cut off) are left out."""
    kept = [turn for turn in turns if turn.tokens]
    if not kept:
        return Score(float("nan"), float("nan"), 0)
    tokens = sum(turn.tokens for turn in kept)
    return Score(
        loss=sum(turn.nll for turn in kept) / tokens,
        accuracy=sum(turn.exact for turn in kept) / len(kept),
        answers=len(kept),
    )


def recovered(method: float, base: float, oracle: float) -> float:
    """Share of the oracle's gain over the base that a method keeps: 1 for the oracle, 0 for the base.

    Works on losses and on accuracies alike; NaN where the oracle gains nothing.
    """
    gain = oracle - base
    return (method - base) / gain if gain else float("nan")
