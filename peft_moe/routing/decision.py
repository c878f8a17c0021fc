"""One routing decision: gates of all experts, or the chosen ones. See `routing.context` for the letters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from ..errors import PeftMoeError


class Routing:
    """One routing decision: the only value that goes from a router to ops, losses and reports.

    A decision for k experts per token consists of their numbers and weights. The dense tensors are computed
    when they are read.

    Attributes:
        gates: weights of the experts, float32, [B|1, T|1, E]; a size of 1 means "the same for all".
        logits: scores before the selection, float32, [B|1, T|1, X]; None where nothing was scored.
        selected: which columns the selector kept, bool, [B|1, T|1, X]; None for dense gates.
        running: the summary of the text behind the decision, [B, T, I], for a router that continues it in the
            next step; else None.
        expert_ids: numbers of the chosen experts where all tokens have equally many, long [B|1, T|1, K]:
            distinct, unordered, shared experts included. E stands for "no expert" (the null expert).
        expert_weights: the gates of ``expert_ids``, [B|1, T|1, K]; 0 for "no expert". Other gates are zero.
        may_select_null: whether "no expert" may be among ``expert_ids``.
    """

    def __init__(
        self,
        gates: Tensor | None = None,
        logits: Tensor | None = None,
        selected: Tensor | None = None,
        running: Tensor | None = None,
        expert_ids: Tensor | None = None,
        expert_weights: Tensor | None = None,
        *,
        experts: int = 0,
        columns: int = 0,
        may_select_null: bool = True,
    ) -> None:
        """Make a decision.

        Args:
            gates, logits, selected, running, expert_ids, expert_weights: see the attributes.
            experts: E, for a sparse decision without ``gates``.
            columns: X where ``expert_ids`` are also the numbers of the selected columns, so that ``selected``
                follows from them; else 0.
            may_select_null: see the attributes.
        """
        self.logits, self.running = logits, running
        self.expert_ids, self.expert_weights = expert_ids, expert_weights
        self._experts = experts if gates is None else gates.shape[-1]
        self._columns, self.may_select_null = columns, may_select_null
        self._gates, self._selected = gates, selected

    @property
    def gates(self) -> Tensor:
        """Weights of all experts, [B|1, T|1, E]."""
        if self._gates is not None:
            return self._gates
        ids, weights = self.expert_ids, self.expert_weights
        assert ids is not None, "a decision without gates names experts"
        assert weights is not None
        room = weights.new_zeros(*weights.shape[:-1], self._experts + 1)
        gates = room.scatter(-1, ids, weights)[..., : self._experts]
        # Gates that were computed without a graph must not be cached for a use that needs one.
        if torch.is_grad_enabled() or not weights.requires_grad:
            self._gates = gates
        return gates

    @property
    def selected(self) -> Tensor | None:
        """The columns that the selector kept, [B|1, T|1, X]; None for dense gates."""
        ids = self.expert_ids
        if self._selected is None and self._columns and ids is not None:
            room = torch.zeros(*ids.shape[:-1], self._columns, dtype=torch.bool, device=ids.device)
            self._selected = room.scatter_(-1, ids, True)
        return self._selected

    @property
    def is_constant(self) -> bool:
        """True where one row of gates serves every token of every sequence."""
        shape = (self.gates if self.expert_ids is None else self.expert_ids).shape
        return len(shape) == 3 and shape[0] == shape[1] == 1

    def replace(self, **changes: Tensor | None) -> Routing:
        """Return the decision with other tensors, by the names of the arguments."""
        tensors: dict[str, Any] = {
            "gates": self._gates,
            "logits": self.logits,
            "selected": self._selected,
            "running": self.running,
            "expert_ids": self.expert_ids,
            "expert_weights": self.expert_weights,
        }
        return Routing(
            **{**tensors, **changes},
            experts=self._experts,
            columns=self._columns,
            may_select_null=self.may_select_null,
        )

    def map(self, move: Callable[[Tensor], Tensor]) -> Routing:
        """Return the decision with ``move`` applied to each of its tensors, along B and T."""
        tensors = (
            self._gates,
            self.logits,
            self._selected,
            self.running,
            self.expert_ids,
            self.expert_weights,
        )
        moved = (None if t is None else move(t) for t in tensors)
        return Routing(
            *moved, experts=self._experts, columns=self._columns, may_select_null=self.may_select_null
        )

    def bare(self) -> Routing:
        """Return what layers need of the decision: gates, or the chosen experts with their weights."""
        gates = self._gates if self.expert_ids is None else None
        return Routing(
            gates,
            expert_ids=self.expert_ids,
            expert_weights=self.expert_weights,
            experts=self._experts,
            may_select_null=self.may_select_null,
        )

    def detach(self) -> Routing:
        """Return the decision without the graph that computed it."""
        return self.map(Tensor.detach)


@overload
def per_token(values: Tensor, x: Tensor, tokens: int) -> Tensor: ...
@overload
def per_token(values: None, x: Tensor, tokens: int) -> None: ...
def per_token(values: Tensor | None, x: Tensor, tokens: int) -> Tensor | None:
    """Return a tensor of a decision for the tokens of ``x`` [..., I]: [1, E] where it is constant, else [N,
    E].

    Raises:
        PeftMoeError: ``x`` has other tokens than the decision.
    """
    if values is None:
        return None
    rows, columns, last = values.shape
    if rows == columns == 1:
        return values.view(1, last)
    # With several images or windows per text, the text of a row is not known here.
    same_rows = x.dim() < 3 or x.shape[0] in (rows, 1)
    if columns == 1 and rows != tokens and same_rows:
        # One decision per sequence. The layer may read [B, T, I] or the same tokens flattened.
        values = values.expand(rows, tokens // rows, last)
    if values.shape[0] * values.shape[1] != tokens:
        raise PeftMoeError(
            f"the decision covers {rows}×{columns} tokens, the layer was given {tuple(x.shape[:-1])}; "
            "this layer sees other tokens than the router: use router_scope='module' or leave it out of "
            "target_modules"
        )
    return values.reshape(tokens, last)
