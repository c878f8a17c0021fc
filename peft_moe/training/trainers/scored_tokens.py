"""Logits and losses at scored tokens: the positions whose next token has a label.

Letters: B batch, T sequence, S = T − 1, N scored tokens, X features or vocabulary, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ...routing.model_call import IGNORE


def logits_call(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a trainer's batch as the arguments of a call that returns logits: no labels, no KV cache."""
    call = {key: value for key, value in inputs.items() if key not in ("labels", "num_items_in_batch")}
    return {**call, "use_cache": False}


def at_scored_tokens(values_BTX: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the rows [N, X] of all positions whose next token has a label."""
    scored_BS = labels_BT[:, 1:].to(values_BTX.device) != IGNORE
    return values_BTX[:, :-1][scored_BS]


def scored_logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Return a model's logits [N, V] at the scored tokens of a batch.

    Args:
        model: a causal language model.
        inputs: the trainer's batch, with ``labels``.
    """
    logits_BTV: Tensor = model(**logits_call(inputs)).logits
    return at_scored_tokens(logits_BTV, inputs["labels"])


def per_scored_token(total: Tensor, tokens: int, num_items: Any, trainer: Any) -> Tensor:
    """Divide a loss that is summed over tokens as the trainer divides the language model's loss.

    Args:
        total: the sum over this batch.
        tokens: number of scored tokens in this batch.
        num_items: number of scored tokens in the optimizer step; None divides by ``tokens``.
        trainer: its arguments say whether ``num_items`` counts the tokens of all processes.
    """
    if num_items is None:
        return total / max(1, tokens)
    loss = total / num_items
    if getattr(trainer.args, "average_tokens_across_devices", False):
        # DDP averages gradients over processes, while num_items counts the tokens of all of them.
        loss = loss * trainer.accelerator.num_processes
    return loss


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put all modules of a model in evaluation mode, and restore the mode of each afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
