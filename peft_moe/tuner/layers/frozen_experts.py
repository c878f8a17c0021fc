"""Some experts of a layer train; the others stay the same to the bit.

The factors of all experts are one parameter. The forward pass detaches the rows of the frozen experts, so
that they get no gradient. Weight decay and the momentum of earlier steps move a parameter without any
gradient, so every step of a ``torch.optim`` optimizer also puts the frozen rows back as they were.
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

# By parameter, the rows [n] that no optimizer may move.
_frozen: Any = WeakIdKeyDictionary()
# By optimizer, the values of those rows when its running step began.
_values_before: WeakKeyDictionary[Optimizer, list[tuple[Tensor, Tensor, Tensor]]] = WeakKeyDictionary()
_hooks: list[Any] = []


def freeze_rows(weight: nn.Parameter, rows_n: Tensor | None) -> None:
    """Freeze rows [n] of a parameter from now on; None frees all of them."""
    if rows_n is None:
        _frozen.pop(weight, None)
        return
    _frozen[weight] = rows_n
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))


def frozen_rows(ranks: RankMap, trains: Sequence[bool]) -> Tensor | None:
    """Ranks of the experts that do not train, long [n]; None where none trains, or all do.

    Args:
        ranks: of the layer.
        trains: of each expert.
    """
    segments = zip(ranks.slices(), trains, strict=True)
    rows = [row for segment, trained in segments if not trained for row in range(segment.start, segment.stop)]
    return torch.tensor(rows) if rows and any(trains) else None


def detach_frozen_rows(A_RI: Tensor, B_RO: Tensor, rows_n: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both factors to compute with: no gradient reaches the frozen rows."""
    if rows_n is None or not (torch.is_grad_enabled() and A_RI.requires_grad):
        return A_RI, B_RO
    return _without_gradient(A_RI, rows_n), _without_gradient(B_RO, rows_n)


def _without_gradient(weight_RX: Tensor, rows_n: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        registered = _frozen.get(weight_RX) is rows_n
        if isinstance(weight_RX, nn.Parameter) and not registered:
            freeze_rows(weight_RX, rows_n)  # a copy of a model has parameters of its own
    is_frozen_R = torch.zeros(len(weight_RX), dtype=torch.bool, device=weight_RX.device)
    is_frozen_R[rows_n.to(weight_RX.device)] = True
    return torch.where(is_frozen_R[:, None], weight_RX.detach(), weight_RX)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    values_before = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rows_n = _frozen.get(parameter)
            if rows_n is not None:
                rows_n = rows_n.to(parameter.device)
                values_before.append((parameter, rows_n, parameter.detach()[rows_n]))
    if values_before:
        _values_before[optimizer] = values_before


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    with torch.no_grad():
        for parameter, rows_n, values in _values_before.pop(optimizer, []):
            parameter.index_copy_(0, rows_n, values)
