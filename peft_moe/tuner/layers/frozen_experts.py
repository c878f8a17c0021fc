"""Some experts of one stack train, the others must not move by a bit: gradients, decay and momentum included.

The experts' factors are one parameter. In the forward pass the slabs that are held still are taken without
their gradient; and since weight decay and the momentum of earlier steps move a parameter without any
gradient, every step of a ``torch.optim`` optimizer puts those slabs back as they were, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.weak import WeakIdKeyDictionary

from ...ops import RankMap

# Parameter to the rows [n] that no optimizer may move.
_held: Any = WeakIdKeyDictionary()
# Optimizer to what those rows held when its running step began.
_kept: WeakKeyDictionary[Optimizer, list[tuple[Tensor, Tensor, Tensor]]] = WeakKeyDictionary()
_hooks: list[Any] = []


def hold(weight: nn.Parameter, rows_n: Tensor | None) -> None:
    """Keep rows of a parameter still from now on; None lets go of all of them."""
    if rows_n is None:
        _held.pop(weight, None)
        return
    _held[weight] = rows_n
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))


def held_rows(ranks: RankMap, trains: Sequence[bool]) -> Tensor | None:
    """Ranks of the experts that stay while others train, long [n]; None where nobody trains, or all do.

    Args:
        ranks: of the layer.
        trains: of each expert.
    """
    segments = zip(ranks.slices(), trains, strict=True)
    rows = [row for at, one in segments if not one for row in range(at.start, at.stop)]
    return torch.tensor(rows) if rows and any(trains) else None


def trained_part(A_RI: Tensor, B_RO: Tensor, rows_n: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both factors to compute with: no gradient reaches the rows that are held still."""
    if rows_n is None or not (torch.is_grad_enabled() and A_RI.requires_grad):
        return A_RI, B_RO
    return _without_gradient(A_RI, rows_n), _without_gradient(B_RO, rows_n)


def _without_gradient(weight_RX: Tensor, rows_n: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        known = _held.get(weight_RX) is rows_n
        if isinstance(weight_RX, nn.Parameter) and not known:
            hold(weight_RX, rows_n)  # a copy of a model has parameters of its own
    still_R = torch.zeros(len(weight_RX), dtype=torch.bool, device=weight_RX.device)
    still_R[rows_n.to(weight_RX.device)] = True
    return torch.where(still_R[:, None], weight_RX.detach(), weight_RX)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    kept = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rows_n = _held.get(parameter)
            if rows_n is not None:
                rows_n = rows_n.to(parameter.device)
                kept.append((parameter, rows_n, parameter.detach()[rows_n]))
    if kept:
        _kept[optimizer] = kept


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    with torch.no_grad():
        for parameter, rows_n, values in _kept.pop(optimizer, []):
            parameter.index_copy_(0, rows_n, values)
