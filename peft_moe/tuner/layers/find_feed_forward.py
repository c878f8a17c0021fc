"""Finding a base's feed-forward networks by the sizes of their linear layers.

A feed-forward network (FFN) has linears that read its input, from H to F features (or 2·F where gate and up
are one), and one that writes its output, from F to H. Between them, no token reads another one. A table of
names would know only the architectures of today.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ...errors import PeftMoeError
from ...experts.base_modules import base_modules, linear_sizes

# Modules below these names mix tokens, whatever the sizes of their linears.
_TOKENS_MEET = re.compile(r"(?i)attn|attention|mixer")
# Names of FFNs. A network with such a name whose layers do not fit is refused, never mixed per linear in
# silence.
_CALLED_SO = re.compile(r"(?i)(^|\.|_)(mlp|ffn?|feed_?forward\w*|dense_?relu_?dense|shared_expert)(\.|$)")


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward network.

    Attributes:
        home: name of the module that calls its layers.
        input_projs: names of the linears that read its input.
        output_proj: name of the linear that writes its output.
    """

    home: str
    input_projs: tuple[str, ...]
    output_proj: str

    @property
    def members(self) -> tuple[str, ...]:
        """Names of all its linears."""
        return (*self.input_projs, self.output_proj)


def find_feed_forwards(base: nn.Module) -> list[FeedForward]:
    """Return all FFNs of a base, in the base's order. Adapters on the base are looked through."""
    modules = base_modules(base)
    sizes = {name: linear_sizes(module) for name, module in modules.items()}
    linears = {n: size for n, size in sizes.items() if size is not None and not _TOKENS_MEET.search(n)}
    # A module with a stack of layers or a convolution does more between its linears than an activation.
    crowded = {
        name
        for name, module in modules.items()
        if any(isinstance(m, nn.ModuleList | nn.modules.conv._ConvNd) for m in module.children())
    } | {""}
    by_home: dict[str, FeedForward] = {}
    # First the linears of one module; then those of its children, as in BERT.
    for depth in (1, 2):
        taken = {member for ffn in by_home.values() for member in ffn.members}
        groups: dict[str, list[str]] = {}
        for name in linears:
            if name not in taken and name.count(".") >= depth:
                groups.setdefault(name.rsplit(".", depth)[0], []).append(name)
        for home, names in groups.items():
            output_proj = _output_proj_of(names, linears)
            if home not in crowded and output_proj is not None:
                input_projs = tuple(name for name in names if name != output_proj)
                by_home[home] = FeedForward(home, input_projs, output_proj)
    order = {name: number for number, name in enumerate(modules)}
    return sorted(by_home.values(), key=lambda ffn: order[ffn.output_proj])


def _output_proj_of(names: list[str], sizes: dict[str, tuple[int, int]]) -> str | None:
    """Return the linear that reads what the others write; the last one if several could."""
    for name in reversed(names) if len(names) > 1 else ():
        inner, outer = sizes[name]
        others = [sizes[other] for other in names if other != name]
        if all(start == outer and end in (inner, 2 * inner) for start, end in others):
            return name
    return None


def feed_forwards_of(base: nn.Module, adapted: Iterable[str]) -> dict[str, FeedForward]:
    """Return the FFNs that contain these linears, by the names of all their linears.

    Args:
        base: the model, with or without adapters.
        adapted: names of its adapted modules.

    Raises:
        PeftMoeError: no FFN contains any, or a linear lies in an FFN whose layers do not fit.
    """
    adapted, every = set(adapted), find_feed_forwards(base)
    by_linear = {member: ffn for ffn in every for member in ffn.members}
    unfit = sorted(n for n in adapted - set(by_linear) if _CALLED_SO.search(n) and not _TOKENS_MEET.search(n))
    if unfit:
        raise PeftMoeError(
            f"mixing='block': {unfit[0]} lies in a feed-forward network whose linear layers do not lead from "
            f"its input to one that writes its output ({len(unfit)} such in target_modules); leave them out "
            "with exclude_modules, or use mixing='linear'"
        )
    if not adapted & set(by_linear):
        known_homes = (
            f"it has some at {every[0].home}" if every else f"{type(base).__name__} has none that is found"
        )
        raise PeftMoeError(
            "mixing='block' mixes at the output of feed-forward networks, and no linear of one is adapted; "
            f"{known_homes}. Put their linears into target_modules, or use mixing='linear'"
        )
    return {name: ffn for name, ffn in by_linear.items() if adapted & set(ffn.members)}
