"""One vector per prompt, and its decision spread back over the tokens.

A pooled decision may look at prompt tokens only: pooling over the completion would show a causal
model its own future. Letters: B batch, T sequence, S turns, I in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import PeftMoeError
from ..routing.context import Routing, RoutingContext

POOLS = ("mean", "last")


def pool_prompts(x_BTI: Tensor, context: RoutingContext, how: str) -> Tensor:
    """Summarise every turn's prompt.

    Args:
        x_BTI: the router's input.
        context: which tokens are prompt, and to which turn each belongs.
        how: "mean" over the prompt's tokens, or its "last" one.

    Returns:
        [B, S, I] in the dtype of ``x_BTI``; rows of turns that a sequence lacks are zero.
    """
    weights_BST = _pool_weights(x_BTI, context, how)
    # A weight of zero would not hide NaN or infinity, which hidden states at padding may be.
    seen_BT1 = (weights_BST != 0).any(dim=1)[..., None]
    return weights_BST @ torch.where(seen_BT1, x_BTI, 0.0)


def _pool_weights(x_BTI: Tensor, context: RoutingContext, how: str) -> Tensor:
    batch, length, _ = x_BTI.shape
    if context.prompt_missing:
        raise PeftMoeError(
            "router_granularity='sequence' decides from the prompt, and a row of this batch has no prompt "
            "token (plain text, or every label is trained on); use prompt/completion data, or "
            "router_granularity='token'"
        )
    prompt_BT = context.prompt if context.prompt is not None else context.real
    if prompt_BT is None:
        prompt_BT = torch.ones(batch, length, dtype=torch.bool, device=x_BTI.device)
    if prompt_BT.shape != (batch, length):
        raise PeftMoeError(
            f"prompt mask is {tuple(prompt_BT.shape)}, the routed tokens are {(batch, length)}; "
            "pass one that covers exactly the tokens of this call"
        )
    if context.segment is None:
        member_BST = prompt_BT[:, None, :]
    else:
        turns_S = torch.arange(context.num_segments, device=x_BTI.device)
        member_BST = prompt_BT[:, None, :] & (context.segment[:, None, :] == turns_S[None, :, None])
    if how == "last":
        # The last member of each row is where the count of members from the right is 1.
        from_right_BST = member_BST.flip(-1).cumsum(-1).flip(-1)
        member_BST = member_BST & (from_right_BST == 1)
    weights_BST = member_BST.to(x_BTI.dtype)
    return weights_BST / weights_BST.sum(dim=-1, keepdim=True).clamp_min(1)


def spread_turns(routing: Routing, context: RoutingContext) -> Routing:
    """Give each token the decision of its turn: [B, S, ·] to [B, T, ·], or [B, 1, ·] for one turn."""
    if context.segment is None:
        return routing
    segment_BT = context.segment

    def take(values_BSX: Tensor) -> Tensor:
        index_BTX = segment_BT[..., None].expand(-1, -1, values_BSX.shape[-1])
        return values_BSX.gather(1, index_BTX)

    return routing.map(take)
