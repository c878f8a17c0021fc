"""What a router is told: plain values, resolved from a ``MoLoraConfig`` before any layer exists."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RouterSettings:
    """One router's settings; the meaning of each is documented in ``MoLoraConfig``.

    Attributes:
        scorer: registered name of what turns an input into scores.
        num_experts: E.
        null_expert: whether a further column stands for "no expert: the base alone".
        top_k: how many columns a decision keeps; None keeps all (dense).
        scoring_func: "softmax" or "sigmoid".
        norm_topk_prob: whether the kept weights are divided by their sum.
        straight_through: hard gates forward, gradients of the dense weights backward.
        temperature: what scores are divided by.
        granularity: "token", or "sequence" for one decision per prompt.
        pool: how a prompt is summarised for it: "mean" over its tokens, or its "last" one.
        input_norm: whether inputs are divided by their root mean square first.
        init_std: standard deviation of the scorer's initial weights; 0 starts from equal scores.
    """

    scorer: str
    num_experts: int
    null_expert: bool = False
    top_k: int | None = None
    scoring_func: str = "softmax"
    norm_topk_prob: bool = True
    straight_through: bool = False
    temperature: float = 1.0
    granularity: str = "token"
    pool: str = "mean"
    input_norm: bool = False
    init_std: float = 0.0

    @property
    def num_columns(self) -> int:
        """X: the experts, plus the null expert where there is one."""
        return self.num_experts + int(self.null_expert)
