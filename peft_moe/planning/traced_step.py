"""One training step of a router, run without memory and without arithmetic, to see what it would hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PeftMoeError
from .live_bytes import fake_weights


def step_peak(
    model: Any,
    *,
    batch: int,
    sequence: int,
    loss: str,
    checkpointing: bool,
    autocast: torch.dtype | None,
    device: str,
) -> int:
    """Most bytes that a forward and a backward pass hold besides the weights.

    Args:
        model: a PeftModel on "meta"; its weights are replaced.
        batch, sequence: tokens of the step, none of them padding.
        loss: "fused", TRL's head that never holds all logits, or "full".
        checkpointing: layers are computed again in the backward pass.
        autocast: to which type, if at all.
        device: "cuda" or "cpu"; TRL's head uses other kernels there.

    Raises:
        PeftMoeError: the fused head without TRL.
    """
    if loss == "fused":
        _fuse_head(model.get_base_model())
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    with ExitStack() as stack:
        live = stack.enter_context(fake_weights(model))
        stack.enter_context(_no_mask())
        if loss == "fused":
            stack.enter_context(_triton_head() if device != "cpu" else _touched_tile(model))
        if autocast is not None:
            stack.enter_context(torch.autocast("cpu", autocast))
        with torch.device("cpu"):
            ids = torch.zeros(batch, sequence, dtype=torch.long)
        with live:
            total = _loss(model, ids, loss)
            total.backward()  # type: ignore[no-untyped-call]  # untyped, torch's
            del total
        return live.peak


def _loss(model: nn.Module, ids: Tensor, loss: str) -> Tensor:
    # Labels by another name: those of "labels" would mark prompts, whose values nobody knows here.
    if loss == "fused":
        fused: Tensor = model(
            input_ids=ids, shift_labels=ids.clone(), fused_lm_head=True, use_cache=False
        ).loss
        return fused
    logits = model(input_ids=ids, use_cache=False).logits
    # As transformers' own loss does: all logits once more in float32.
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten())


def _fuse_head(base: Any) -> None:
    try:
        from trl.trainer.utils import add_fused_lm_head
    except ImportError as error:
        raise PeftMoeError(
            "loss='fused' is TRL's, which is not installed; install peft-moe[train], or plan with loss='full'"
        ) from error
    # What its SFTTrainer asks for.
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))


@contextmanager
def _triton_head() -> Iterator[None]:
    """TRL's head as on a GPU, where kernels work in place on the tile that its torch version copies."""
    from trl.kernels import chunked_logprob

    def in_place(*args: Any, **kwargs: Any) -> None:
        """Nothing is allocated."""

    names = ("_forward_tile", "_backward_tile", "_addmm_fp32")
    kept = {name: getattr(chunked_logprob, name) for name in names}
    try:
        for name in names:
            setattr(chunked_logprob, name, in_place)
        yield
    finally:
        for name, function in kept.items():
            setattr(chunked_logprob, name, function)


@contextmanager
def _touched_tile(model: Any) -> Iterator[None]:
    """A CPU gives memory to the pages that are written: of TRL's tile, the columns of the vocabulary."""
    from trl.trainer import utils

    kept = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    columns: int = model.get_base_model().get_output_embeddings().weight.shape[0]
    utils._CHUNKED_LOGPROB_CHUNK_SIZE = min(kept, columns)
    try:
        yield
    finally:
        utils._CHUNKED_LOGPROB_CHUNK_SIZE = kept


@contextmanager
def _no_mask() -> Iterator[None]:
    """A batch without packing needs no mask; without values to look at, transformers would make one."""
    from transformers import masking_utils

    kept = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda *_, **__: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = kept
