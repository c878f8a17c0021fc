"""What a loss sees of a decision: the columns that its layer has, without experts that are always on."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...routing.context import Routing, RoutingContext
from ..settings import RouterSettings


def present_columns(settings: RouterSettings) -> list[int]:
    """Columns of the experts that the layer has, and of the null expert."""
    missing = settings.missing_columns
    return [column for column in range(settings.num_columns) if column not in missing]


def visible(
    routing: Routing, context: RoutingContext, settings: RouterSettings | None
) -> tuple[Routing, RoutingContext]:
    """A decision as losses see it.

    Args:
        routing: as recorded, with logits.
        context: the pass that it belongs to.
        settings: of the router that decided; None leaves everything as it is.

    Returns:
        The decision without the columns that the layer lacks and with the gates of routed experts only,
        and the context with the domains renumbered accordingly: a domain whose expert is not here is
        unknown here.
    """
    if settings is None or not (settings.missing_columns or settings.shared):
        return routing, context
    columns = present_columns(settings)
    experts = [settings.routed[column] for column in columns if column < len(settings.routed)]

    def keep(values: Tensor, index: list[int]) -> Tensor:
        return values.index_select(-1, torch.tensor(index, device=values.device, dtype=torch.long))

    seen = Routing(
        gates=keep(routing.gates, experts),
        logits=None if routing.logits is None else keep(routing.logits, columns),
        selected=None if routing.selected is None else keep(routing.selected, columns),
    )
    if context.domains is None or not settings.missing_columns:
        return seen, context
    # One more entry at the end, which the index -1 finds: unknown stays unknown.
    places = torch.full((settings.num_columns + 1,), -1, device=context.domains.device)
    places[columns] = torch.arange(len(columns), device=places.device)
    return seen, replace(context, domains=places[context.domains])
