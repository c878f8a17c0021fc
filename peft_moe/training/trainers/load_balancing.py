"""Load balancing and sparsity by rules between optimizer steps: DeepSeek's bias and ReMoE's L1 weight.

Letters: B batch, T sequence, X columns (routed experts, plus the null expert).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...routers import Router
from ...routers.losses import decision_weights, present_columns, visible
from ...routing.context import RoutingRecord
from .distributed import sum_over_processes

L1_FACTOR = 1.2
"""The factor by which the L1 weight changes per step (ReMoE, arXiv 2412.14711)."""


class BiasBalancer:
    """Updates each router's balancing bias: b ← b + u·sign(mean load − load) (arXiv 2408.15664).

    The load of a column is the number of real tokens of the step that selected it, over all micro-batches and
    processes. The bias changes the top-k selection only, never the gates. A column that a layer lacks has no
    load and keeps its bias.

    Args:
        routers: by the name under which their decisions are recorded; routers without a bias are ignored.
    """

    def __init__(self, routers: Mapping[str, Router]) -> None:
        self.routers = {name: r for name, r in routers.items() if r.balance_bias is not None}
        self._loads: dict[str, Tensor] = {}

    def count(self, record: RoutingRecord) -> None:
        """Add the selections of one forward pass."""
        for name in self.routers.keys() & record.decisions.keys():
            routing = record.decisions[name]
            if routing.selected is None or record.context is None:
                continue
            weights_BT1 = decision_weights(routing, record.context)[..., None]
            load_X = (routing.selected * weights_BT1).sum(dim=(0, 1)).detach()
            self._loads[name] = self._loads[name] + load_X if name in self._loads else load_X

    def step(self) -> None:
        """Update every bias by the loads counted since the last step."""
        if not self.routers:
            return
        device = next(iter(self.routers.values())).balance_bias.device  # type: ignore[union-attr]
        # All processes must call the sum with the same shapes, hence zeros for a router that a process never
        # ran.
        loads = [
            self._loads.get(name, torch.zeros(router.settings.num_columns)).to(device)
            for name, router in self.routers.items()
        ]
        totals = torch.split(sum_over_processes(torch.cat(loads)), [len(load) for load in loads])
        for router, load_X in zip(self.routers.values(), totals, strict=True):
            _update_bias(router, load_X)
        self._loads.clear()

    def largest(self) -> float:
        """Return the largest |b| of all routers."""
        return max((float(r.balance_bias.abs().max()) for r in self.routers.values()), default=0.0)  # type: ignore[union-attr]


def _update_bias(router: Router, load_X: Tensor) -> None:
    bias_X = router.balance_bias
    assert bias_X is not None
    columns = torch.tensor(present_columns(router.settings), device=load_X.device)
    load = load_X[columns]
    change = router.settings.bias_update_rate * torch.sign(load.mean() - load)
    with torch.no_grad():
        bias_X[columns.to(bias_X.device)] += change.to(bias_X)


class SparsityController:
    """Adapts the weight of the L1 loss as ReMoE does, until a target share of the gates is zero.

    Per step the weight is multiplied by 1.2 while the share is below the target, and divided by 1.2 above it.

    Args:
        routers: by the name under which their decisions are recorded.
        target: target share of zero gates.
        values: stores the weight, as ``values["l1_weight"]``.
    """

    def __init__(self, routers: Mapping[str, Router], target: float, values: dict[str, float]) -> None:
        self.settings = {name: router.settings for name, router in routers.items()}
        self.target = target
        self.values = values
        self._counts: Tensor | None = None

    def count(self, record: RoutingRecord) -> None:
        """Add the number of zero gates and the number of all gates of one forward pass."""
        for name in self.settings.keys() & record.decisions.keys():
            routing, context = record.decisions[name], record.context
            if routing.logits is None or context is None:
                continue
            routing, context = visible(routing, context, self.settings[name])
            weights_BT1 = decision_weights(routing, context)[..., None]
            zeros = ((routing.gates == 0) * weights_BT1).sum()
            gates = weights_BT1.sum() * routing.gates.shape[-1]
            counts = torch.stack((zeros, gates)).detach().double()
            self._counts = counts if self._counts is None else self._counts + counts.to(self._counts.device)

    def step(self) -> None:
        """Adapt the weight by the gates counted since the last step."""
        if self._counts is None:
            return
        zeros, gates = sum_over_processes(self._counts).tolist()
        self._counts = None
        share = zeros / max(gates, 1.0)
        if share < self.target:
            self.values["l1_weight"] *= L1_FACTOR
        elif share > self.target:
            self.values["l1_weight"] /= L1_FACTOR
