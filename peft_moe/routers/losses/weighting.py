"""Which decisions count in a loss: those on real tokens. Letters: B batch, T sequence, X columns."""

from __future__ import annotations

from torch import Tensor

from ...routing.context import Routing, RoutingContext


def decision_weights(routing: Routing, context: RoutingContext) -> Tensor:
    """1 where a decision concerns a real token, 0 where it concerns padding: [B|1, T|1] float32.

    A decision for a whole sequence counts once if any of its tokens is real.
    """
    scored = routing.logits if routing.logits is not None else routing.gates
    rows, columns = scored.shape[:2]
    if context.real is None or rows * columns == 1:
        return scored.new_ones(rows, columns).float()
    real_BT = context.real.to(scored.device)
    if real_BT.shape == (rows, columns):
        return real_BT.float()
    if columns == 1 and rows == real_BT.shape[0]:
        return real_BT.any(dim=1, keepdim=True).float()
    if real_BT.numel() == rows * columns:
        return real_BT.reshape(rows, columns).float()
    # A module that sees a subset of the tokens (the experts of a sparse base): no padding is known.
    return scored.new_ones(rows, columns).float()


def weighted_mean(values_BTX: Tensor, weights_BT: Tensor) -> Tensor:
    """The mean over decisions, [X]; zero where none counts."""
    total_X = (values_BTX * weights_BT[..., None]).sum(dim=(0, 1))
    return total_X / weights_BT.sum().clamp_min(1)


def decision_domains(routing: Routing, context: RoutingContext) -> Tensor | None:
    """The right column for each decision, -1 where it is not known: long [B, T|1]; None without labels.

    A decision that serves tokens of several domains has no right column.

    Args:
        routing: one layer's decisions, with logits [B, T|1, X].
        context: its ``domains`` are per sequence, [B], or per token, [B, T].
    """
    assert routing.logits is not None  # callers filter
    domains, (rows, columns) = context.domains, routing.logits.shape[:2]
    if domains is None:
        return None
    domains = domains.to(routing.logits.device)
    if domains.dim() == 1:
        return domains[:, None].expand(rows, columns) if len(domains) == rows else None
    if domains.shape == (rows, columns):
        return domains
    if columns == 1 and len(domains) == rows:
        first_B1 = domains.max(dim=1, keepdim=True).values
        other_BT = domains != first_B1
        if context.real is not None:
            other_BT = other_BT & context.real.to(domains.device)
        return first_B1.masked_fill(other_BT.any(dim=1, keepdim=True), -1)
    if domains.numel() == rows * columns:
        return domains.reshape(rows, columns)
    return None
