"""Balancing that moves between optimizer steps instead of by gradients: DeepSeek's bias, ReMoE's L1 weight.

Letters: X columns (routed experts, plus the null expert).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...routers import Router
from ...routers.losses import decision_weights, present_columns, visible
from ...routing.context import RoutingRecord
from .distributed import summed

L1_FACTOR = 1.2
"""By how much the L1 weight changes per step (ReMoE, arXiv 2412.14711)."""


class BiasBalancer:
    """Moves each router's balancing bias: b ← b + u·sign(mean load − load) (arXiv 2408.15664).

    A column's load is how many real tokens of the step chose it, in all micro-batches and processes. The
    bias joins the choice of the top k only; columns that a layer lacks take no part.

    Args:
        routers: by the name under which their decisions are recorded; those without a bias are left alone.
    """

    def __init__(self, routers: Mapping[str, Router]) -> None:
        self.routers = {name: r for name, r in routers.items() if r.balance_bias is not None}
        self._loads: dict[str, Tensor] = {}

    def count(self, record: RoutingRecord) -> None:
        """Add the choices of one forward pass."""
        for name in self.routers.keys() & record.decisions.keys():
            routing = record.decisions[name]
            if routing.selected is None or record.context is None:
                continue
            weights_BT1 = decision_weights(routing, record.context)[..., None]
            load_X = (routing.selected * weights_BT1).sum(dim=(0, 1)).detach()
            self._loads[name] = self._loads[name] + load_X if name in self._loads else load_X

    def step(self) -> None:
        """Move every bias by the loads counted since the last step."""
        if not self.routers:
            return
        device = next(iter(self.routers.values())).balance_bias.device  # type: ignore[union-attr]
        # A process whose batches never reached a router still takes part in the sum.
        loads = [
            self._loads.get(name, torch.zeros(router.settings.num_columns)).to(device)
            for name, router in self.routers.items()
        ]
        totals = summed(torch.cat(loads)).split([len(load) for load in loads])
        for router, load_X in zip(self.routers.values(), totals, strict=True):
            _move(router, load_X)
        self._loads.clear()

    def largest(self) -> float:
        """The largest |b| of all routers."""
        return max((float(r.balance_bias.abs().max()) for r in self.routers.values()), default=0.0)  # type: ignore[union-attr]


def _move(router: Router, load_X: Tensor) -> None:
    bias_X = router.balance_bias
    assert bias_X is not None
    columns = torch.tensor(present_columns(router.settings), device=load_X.device)
    load = load_X[columns]
    change = router.settings.bias_update_rate * torch.sign(load.mean() - load)
    with torch.no_grad():
        bias_X[columns.to(bias_X.device)] += change.to(bias_X)


class SparsitySteering:
    """ReMoE's adaptive weight of the L1 loss: × 1.2 per step below the target share of zero gates, else ÷.

    Args:
        routers: by the name under which their decisions are recorded.
        target: wanted share of zero gates.
        values: where the weight is kept, as ``values["l1_weight"]``.
    """

    def __init__(self, routers: Mapping[str, Router], target: float, values: dict[str, float]) -> None:
        self.settings = {name: router.settings for name, router in routers.items()}
        self.target = target
        self.values = values
        self._counts: Tensor | None = None

    def count(self, record: RoutingRecord) -> None:
        """Add the gates of one forward pass: how many are zero, and how many there are."""
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
        """Move the weight by what was counted since the last step."""
        if self._counts is None:
            return
        zeros, gates = summed(self._counts).tolist()
        self._counts = None
        share = zeros / max(gates, 1.0)
        if share < self.target:
            self.values["l1_weight"] *= L1_FACTOR
        elif share > self.target:
            self.values["l1_weight"] /= L1_FACTOR
