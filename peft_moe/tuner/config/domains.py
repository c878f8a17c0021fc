"""Names of domains to columns of the router: what a sample's label means to a mixture."""

from __future__ import annotations

from collections.abc import Callable

from .mixture import MoLoraConfig

UNKNOWN = -1


def domain_columns(config: MoLoraConfig) -> Callable[[str | None], int]:
    """A function from a domain's name to the router's column for it.

    A routed expert's own name is its column. Any other name means "none of the experts": the null expert's
    column where there is one, else :data:`UNKNOWN`. A missing domain is unknown.
    """
    columns = {name: index for index, name in enumerate(config.routed_names)}
    elsewhere = len(config.routed_names) if config.null_expert else UNKNOWN

    def column(domain: str | None) -> int:
        return UNKNOWN if domain is None else columns.get(domain, elsewhere)

    return column
