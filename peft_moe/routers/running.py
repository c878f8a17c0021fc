"""A prompt's summary that follows the text: what a decision needs that must notice a change of subject.

The prompt's tokens see the pooled prompt, as a decision per prompt does. From there on the summary is a
running mean of the completion, f_t = a·f_{t-1} + (1-a)·x_t, so that a new subject takes over after about one
half-life, and a single odd token does not. It looks back only, hence it leaks nothing.

Letters: B batch, T sequence, C chunk, I in.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..routing.context import RoutingContext
from .pooling import pool_prompts

# Within a chunk the recurrence is one product with a [C, C] matrix; from chunk to chunk it is carried.
_CHUNK = 128


def running_features(
    x_BTI: Tensor, context: RoutingContext, how: str, half_life: float, before_BI: Tensor | None
) -> Tensor:
    """Summary of what came before, at every token.

    Args:
        x_BTI: the router's input, float32 or wider.
        context: which tokens are real and which are prompt. Without a prompt mask all tokens of a first
            call are prompt, and none of a call that continues a text.
        how: "mean" over the prompt's tokens, or its "last" one.
        half_life: tokens after which an earlier token counts half.
        before_BI: the summary behind the last token of the call that is continued; None for a new text.

    Returns:
        [B, T, I]. A row without prompt starts from its first token.
    """
    batch, length, _ = x_BTI.shape
    real_BT = context.real if context.real is not None else _mask(x_BTI, True)
    prompt_BT = context.prompt
    if prompt_BT is None:
        prompt_BT = real_BT if before_BI is None else _mask(x_BTI, False)
    if before_BI is None:
        first_BT = real_BT & (real_BT.cumsum(-1) == 1)
        prompt_BT = prompt_BT | (first_BT & ~prompt_BT.any(-1, keepdim=True))
        before_BI = x_BTI.new_zeros(batch, x_BTI.shape[-1])
    decay = 0.5 ** (1.0 / half_life)
    entering_BTI = (1 - decay) * torch.where(real_BT[..., None], x_BTI, 0.0)
    turns = replace(context, prompt=prompt_BT, prompt_missing=False)
    pooled_BSI = pool_prompts(x_BTI, turns, how)
    segment_BT = context.segment
    if segment_BT is None:
        segment_BT = torch.zeros(batch, length, dtype=torch.long, device=x_BTI.device)
    own_BTI = pooled_BSI.gather(1, segment_BT[..., None].expand_as(x_BTI))
    entering_BTI = torch.where(prompt_BT[..., None], own_BTI, entering_BTI)
    return _scan(entering_BTI, prompt_BT, real_BT & ~prompt_BT, decay, before_BI)


def _mask(x_BTI: Tensor, value: bool) -> Tensor:
    return torch.full(x_BTI.shape[:2], value, dtype=torch.bool, device=x_BTI.device)


def _scan(
    entering_BTI: Tensor, resets_BT: Tensor, decays_BT: Tensor, decay: float, before_BI: Tensor
) -> Tensor:
    """f_t = c_t·f_{t-1} + entering_t, with c = 0 at resets, ``decay`` where it decays, else 1."""
    out = []
    for start in range(0, entering_BTI.shape[1], _CHUNK):
        part = slice(start, start + _CHUNK)
        resets_BC, steps_BC = resets_BT[:, part].cumsum(-1), decays_BT[:, part].cumsum(-1)
        weights_BCC = _powers(decay, steps_BC[:, :, None] - steps_BC[:, None, :], entering_BTI)
        same_BCC = (resets_BC[:, :, None] == resets_BC[:, None, :]).tril()
        carried_BC = _powers(decay, steps_BC, entering_BTI) * (resets_BC == 0)
        chunk_BCI = (weights_BCC * same_BCC) @ entering_BTI[:, part] + carried_BC[..., None] * before_BI[
            :, None
        ]
        out.append(chunk_BCI)
        before_BI = chunk_BCI[:, -1]
    return torch.cat(out, dim=1)


def _powers(decay: float, exponents: Tensor, like: Tensor) -> Tensor:
    # Above the diagonal exponents are negative, and are masked away: clamped, lest they overflow first.
    return torch.pow(torch.tensor(decay, dtype=like.dtype, device=like.device), exponents.clamp_min(0))
