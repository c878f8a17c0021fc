"""What a router is told: plain values, resolved from a ``MoLoraConfig`` before any layer exists."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RouterSettings:
    """One router's settings; the meaning of each is documented in ``RoutingFields``.

    Attributes:
        scorer: registered name of what turns an input into scores.
        num_experts: E, the length of the gates.
        shared: indices of experts that always weigh 1; they have no column.
        null_expert: whether a further column stands for "no expert: the base alone".
        present: how many of the experts exist in this layer, counted from the first; None for all.
        top_k: how many columns a decision keeps; None keeps all (dense).
        topk_method: "greedy", "top_p" or "expert_choice": how the kept columns are chosen.
        top_p: the probability mass that "top_p" keeps.
        scoring_func: "softmax", "sigmoid", "relu" or "none".
        norm_topk_prob: whether the kept weights are divided by their sum.
        straight_through: hard gates forward, gradients of the dense weights backward.
        temperature: what scores are divided by.
        scaling_factor: what the routed weights are multiplied by.
        bias_update_rate: step of the balancing bias; above 0 the router has one.
        granularity: "token", "sequence" for one decision per prompt, or "running" for one that starts from
            the prompt and follows the text.
        window: half-life of the running summary, in tokens.
        pool: how a prompt is summarised for it: "mean" over its tokens, or its "last" one.
        input_norm: whether inputs are divided by their root mean square first.
        hidden_size: width of the hidden layer of scorers that have one.
        init_std: standard deviation of the scorer's initial weights; 0 starts from equal scores.
        routed: follows from these: indices of the experts that have a column, in the order of the columns.
        num_columns: follows: X, the routed experts, plus the null expert where there is one.
        missing_columns: follows: columns of experts that this layer does not have.
        is_sparse: follows: whether a decision leaves columns out.
    """

    scorer: str
    num_experts: int
    shared: tuple[int, ...] = ()
    null_expert: bool = False
    present: int | None = None
    top_k: int | None = None
    topk_method: str = "greedy"
    top_p: float | None = None
    scoring_func: str = "softmax"
    norm_topk_prob: bool = True
    straight_through: bool = False
    temperature: float = 1.0
    scaling_factor: float = 1.0
    bias_update_rate: float = 0.0
    granularity: str = "token"
    pool: str = "mean"
    window: float = 12.0
    input_norm: bool = False
    hidden_size: int = 64
    init_std: float = 0.0

    # Made once: a decision asks for them many times, and a compiler reads plain values best.
    routed: tuple[int, ...] = field(init=False, repr=False, compare=False)
    num_columns: int = field(init=False, repr=False, compare=False)
    missing_columns: tuple[int, ...] = field(init=False, repr=False, compare=False)
    is_sparse: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        routed = tuple(index for index in range(self.num_experts) if index not in self.shared)
        columns = len(routed) + int(self.null_expert)
        present = self.num_experts if self.present is None else self.present
        missing = tuple(column for column, expert in enumerate(routed) if expert >= present)
        kept = columns if self.top_k is None else self.top_k
        sparse = self.topk_method != "greedy" or kept < columns - len(missing)
        made = {"routed": routed, "num_columns": columns, "missing_columns": missing, "is_sparse": sparse}
        for name, value in made.items():
            object.__setattr__(self, name, value)
