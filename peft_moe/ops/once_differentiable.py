"""Backward passes that cannot be differentiated again, and say so."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..errors import PeftMoeError

Gradients = tuple[Tensor | None, ...]


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *gradients: Tensor) -> Gradients:
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Gradients:
        raise PeftMoeError(
            "a second derivative through a mixture was asked for, which its fast forms do not have; "
            "use MoLoraConfig(backend='reference')"
        )


def once_differentiable(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Decorates the ``backward`` of a Function: its gradients are numbers, without a graph of their own.

    Where a graph was asked for, they come with one that raises as soon as it is used.
    """

    @wraps(backward)
    def wrapped(ctx: Any, *gradients: Tensor) -> Gradients:
        again = torch.is_grad_enabled()
        with torch.no_grad():
            found = backward(ctx, *gradients)
        if not again:
            return found
        given = [g.detach().requires_grad_() for g in found if g is not None]
        refused = iter(_Refuse.apply(*given) if given else ())  # type: ignore[no-untyped-call]  # torch's own
        return tuple(None if g is None else next(refused) for g in found)

    return wrapped
