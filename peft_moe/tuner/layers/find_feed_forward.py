"""Where a base's feed-forward networks are, found by how their linear layers fit together.

A feed-forward network (FFN) has linears that read its input, from H to F features (or 2·F where gate and up
are one), and one that writes its output, from F to H; in between every token stands by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ...errors import PeftMoeError
from ...experts.base_modules import base_modules, linear_sizes

# Whatever lies below such a name mixes tokens, however its linears fit together.
_TOKENS_MEET = re.compile(r"(?i)attn|attention|mixer")
# A name of an FFN: one whose layers do not fit is refused, and not mixed per linear in silence.
_CALLED_SO = re.compile(r"(?i)(^|\.|_)(mlp|ffn?|feed_?forward\w*|dense_?relu_?dense|shared_expert)(\.|$)")


@dataclass(frozen=True)
class FeedForward:
    """One FFN.

    Attributes:
        home: the module that calls its layers.
        input_projs: names of the linears that read its input.
        output_proj: name of the one that writes its output.
    """

    home: str
    input_projs: tuple[str, ...]
    output_proj: str

    @property
    def members(self) -> tuple[str, ...]:
        """All its linears."""
        return (*self.input_projs, self.output_proj)


def find_feed_forwards(base: nn.Module) -> list[FeedForward]:
    """All FFNs of a base, in its order; adapters that it carries already are seen through."""
    modules = base_modules(base)
    sizes = {name: linear_sizes(module) for name, module in modules.items()}
    linears = {n: size for n, size in sizes.items() if size is not None and not _TOKENS_MEET.search(n)}
    # What holds a stack of layers, or a convolution, does more between its linears than an activation.
    crowded = {
        name
        for name, module in modules.items()
        if any(isinstance(m, nn.ModuleList | nn.modules.conv._ConvNd) for m in module.children())
    } | {""}
    found: dict[str, FeedForward] = {}
    # The linears of one module; else those of its parts, as BERT has them.
    for depth in (1, 2):
        taken = {member for ffn in found.values() for member in ffn.members}
        groups: dict[str, list[str]] = {}
        for name in linears:
            if name not in taken and name.count(".") >= depth:
                groups.setdefault(name.rsplit(".", depth)[0], []).append(name)
        for home, names in groups.items():
            join = _output_proj_of(names, linears)
            if home not in crowded and join is not None:
                found[home] = FeedForward(home, tuple(n for n in names if n != join), join)
    order = {name: number for number, name in enumerate(modules)}
    return sorted(found.values(), key=lambda ffn: order[ffn.output_proj])


def _output_proj_of(names: list[str], sizes: dict[str, tuple[int, int]]) -> str | None:
    """The linear that the others lead into; the last where several could be it."""
    for name in reversed(names) if len(names) > 1 else ():
        inner, outer = sizes[name]
        others = [sizes[other] for other in names if other != name]
        if all(start == outer and end in (inner, 2 * inner) for start, end in others):
            return name
    return None


def feed_forwards_of(base: nn.Module, adapted: Iterable[str]) -> dict[str, FeedForward]:
    """The FFNs that these linears lie in, by the linears' names.

    Args:
        base: the model, with or without adapters.
        adapted: modules of it.

    Raises:
        PeftMoeError: there is none, or one of the linears lies in an FFN that cannot be taken apart.
    """
    adapted, every = set(adapted), find_feed_forwards(base)
    found = {member: ffn for ffn in every for member in ffn.members}
    unfit = sorted(n for n in adapted - set(found) if _CALLED_SO.search(n) and not _TOKENS_MEET.search(n))
    if unfit:
        raise PeftMoeError(
            f"mixing='block': {unfit[0]} lies in a feed-forward network whose linear layers do not lead from "
            f"its input to one that writes its output ({len(unfit)} such in target_modules); leave them out "
            "with exclude_modules, or use mixing='linear'"
        )
    if not adapted & set(found):
        where = (
            f"it has some at {every[0].home}" if every else f"{type(base).__name__} has none that is found"
        )
        raise PeftMoeError(
            "mixing='block' mixes at the output of feed-forward networks, and no linear of one is adapted; "
            f"{where}. Put their linears into target_modules, or use mixing='linear'"
        )
    return {name: ffn for name, ffn in found.items() if adapted & set(ffn.members)}
