"""Gradient checkpointing: a recomputed layer must find the forward pass that it belongs to.

The backward pass recomputes layers while no forward pass runs. With two passes before one backward pass
(preference training), it recomputes them after another pass has run. So the function that checkpoints a layer
is wrapped: it stores the running context with the checkpoint, and restores it for the recomputation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import PeftMoeError
from .context import RoutingContext, bound_to, current_context


class ContextBoundCheckpoint:
    """A checkpointing function that reruns a layer in the context of its first run."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint ``function``, bound to the context that runs now."""
        context = current_context()
        taken: set[str] = set()

        def in_its_context(*inputs: Any, **named: Any) -> Any:
            with bound_to(context):
                if context is None or torch.compiler.is_compiling():
                    return function(*inputs, **named)
                with _taking_again(context, taken):
                    return function(*inputs, **named)

        return self.checkpoint(in_its_context, *args, **kwargs)


@contextmanager
def _taking_again(context: RoutingContext, taken: set[str]) -> Iterator[None]:
    """Run a layer so that its recomputation takes the decisions that its first run took.

    Before transformers 5.23 a layer's hooks run inside of its checkpoint. A tap that found its decision there
    already would save fewer tensors than in the first run.
    """
    before = dict(context.model_decisions)
    context.retake = frozenset(taken)
    try:
        yield
    finally:
        context.retake = frozenset()
        taken.update(context.model_decisions.keys() - before.keys())
        # Other layers keep the decision that they were computed with.
        context.model_decisions.update({adapter: before[adapter] for adapter in taken & before.keys()})


def bind_checkpoints(model: nn.Module) -> None:
    """Wrap the checkpointing functions of ``model`` that are not wrapped yet.

    It is called in every forward pass of a training, since trainers switch checkpointing on at any time. It
    costs one walk over the modules.
    """
    if not model.training:
        return
    for module in _checkpointed(model):
        function = module._gradient_checkpointing_func
        if not isinstance(function, ContextBoundCheckpoint):
            module._gradient_checkpointing_func = ContextBoundCheckpoint(function)  # type: ignore[assignment,arg-type]


def uses_reentrant(model: nn.Module) -> bool:
    """Whether ``model`` checkpoints with ``use_reentrant=True``."""
    for module in _checkpointed(model):
        function: Any = module._gradient_checkpointing_func
        if isinstance(function, ContextBoundCheckpoint):
            function = function.checkpoint
        if isinstance(function, partial):
            return bool(function.keywords.get("use_reentrant", False))
    return False


def _checkpointed(model: nn.Module) -> Iterator[nn.Module]:
    # transformers gives these two attributes to the layers that it checkpoints.
    for module in model.modules():
        if (
            module.__dict__.get("gradient_checkpointing")
            and "_gradient_checkpointing_func" in module.__dict__
        ):
            yield module


def refuse_reentrant(model: nn.Module) -> None:
    """Refuse reentrant checkpointing, which goes through a shared decision twice in the backward pass.

    Raises:
        PeftMoeError: the model checkpoints with ``use_reentrant=True``.
    """
    if uses_reentrant(model):
        raise PeftMoeError(
            "gradient_checkpointing_kwargs={'use_reentrant': True} cannot train a router that several layers "
            "share, nor a router with auxiliary losses: set use_reentrant=False"
        )
