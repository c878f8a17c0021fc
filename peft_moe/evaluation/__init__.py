"""Scoring: loss and exact match of any causal model on texts of one or more turns."""

from .gain import Score, recovered, summarise
from .score import TurnScore, score_texts

__all__ = ["Score", "TurnScore", "recovered", "score_texts", "summarise"]
