"""Backward passes that cannot be differentiated again, and raise a clear error.

The fast backends write their backward passes by hand, outside of autograd. Torch's own
``once_differentiable`` raises an error that does not tell users what to do; this one names the remedy.
"""

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
            "a second derivative through a mixture was asked for; its fast backends have none. "
            "Use MoLoraConfig(backend='reference')"
        )


def once_differentiable(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Decorate the ``backward`` of an autograd function that has no second derivative.

    The gradients carry no graph. Where the caller asked for one (``create_graph=True``), they carry a graph
    that raises :class:`PeftMoeError` as soon as it is used.
    """

    @wraps(backward)
    def wrapped(ctx: Any, *gradients: Tensor) -> Gradients:
        creates_graph = torch.is_grad_enabled()
        with torch.no_grad():
            results = backward(ctx, *gradients)
        if not creates_graph:
            return results
        leaves = [g.detach().requires_grad_() for g in results if g is not None]
        refusing = iter(_Refuse.apply(*leaves) if leaves else ())  # type: ignore[no-untyped-call]  # torch's own
        return tuple(None if g is None else next(refusing) for g in results)

    return wrapped
