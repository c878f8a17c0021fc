"""Evaluation: loss and exact match of any causal language model, forgetting, and the bake-off of methods."""

from .score import Score, TurnScore, recovered, score_texts, summarise

__all__ = ["Score", "TurnScore", "recovered", "score_texts", "summarise"]
