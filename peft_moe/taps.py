"""Where a router of scope "model" looks: the input of one layer of the base's main stack."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .errors import PeftMoeError, near_matches


@dataclass
class Tap:
    """One tap.

    Attributes:
        name: of the layer whose input is read, as in ``model.named_modules()``.
        layer: that layer.
        index: its place in the stack; None for a layer outside of it.
        below: "probe", "base" or "prompt"; see ``MoLoraConfig.router_below_tap``.
    """

    name: str
    layer: nn.Module
    index: int | None
    below: str

    def lies_above(self, stack_name: str, module_name: str) -> bool:
        """Whether ``module_name`` runs at or behind the tap."""
        if self.index is None or not module_name.startswith(stack_name + "."):
            return True
        return int(module_name[len(stack_name) + 1 :].split(".", 1)[0]) >= self.index


def find_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The base's main stack of layers: the longest ``ModuleList``, the outermost of equals.

    Returns:
        Its name and itself.

    Raises:
        PeftMoeError: the base has none.
    """
    stacks = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not stacks:
        raise PeftMoeError(
            f"router_scope='model' needs a base with a stack of layers; {type(model).__name__} has none. "
            "Use router_scope='module'"
        )
    # Expert lists of a sparse base may be longer than its stack, but lie inside of it.
    outermost = [s for s in stacks if not any(s[0].startswith(other[0] + ".") for other in stacks)]
    return max(outermost, key=lambda stack: len(stack[1]))


def find_tap(model: nn.Module, where: int | str | None, below: str) -> tuple[Tap, str]:
    """Resolve ``router_tap``.

    Args:
        model: the base.
        where: an index into the main stack, the name of a layer of it, or None for the default.
        below: "probe", "base" or "prompt".

    Returns:
        The tap and the stack's name.

    Raises:
        PeftMoeError: there is no such layer.
    """
    stack_name, stack = find_stack(model)
    names = [f"{stack_name}.{index}" for index in range(len(stack))]
    index = len(stack) // 2 if where is None else where
    if isinstance(index, str):
        if index not in names:
            raise PeftMoeError(f"router_tap={index!r} is no layer of the base.{near_matches(index, names)}")
        index = names.index(index)
    if not 0 <= index < len(stack):
        raise PeftMoeError(
            f"router_tap={index} is outside of the base's {len(stack)} layers; use 0 to {len(stack) - 1}"
        )
    return Tap(names[index], stack[index], index, below), stack_name
