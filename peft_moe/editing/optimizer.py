"""An optimizer that goes on after its mixture was edited: groups, states, and their order in a checkpoint."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from .mixture import Edited, Move

_PREFIX = "molora_"


def follow_edit(optimizer: Any, model: nn.Module, edited: Edited) -> None:
    """Let an optimizer go on with the edited model.

    Parameters that were replaced are replaced in their groups; moments move with their slabs and rows, and
    are zero for new ones; a state of another shape starts anew, with a warning. New parameters join the group
    of their kind. Groups are put into the model's order of parameters, in which a resumed run makes them.

    Args:
        optimizer: of torch, or accelerate's wrapper of one.
        model: the edited model.
        edited: what the edit returned.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    after = {before: (new, move) for before, new, move in edited.changes}
    for group in inner.param_groups:
        kept = [after[p][0] if p in after else p for p in group["params"]]
        group["params"] = [p for p in kept if p is not None]
    restarted = 0
    for before, (new, move) in after.items():
        state = inner.state.pop(before, None)
        if state is None or new is None:
            continue
        moved = _moved(state, before, move)
        restarted += moved is None
        if moved is not None:
            inner.state[new] = moved
    if restarted:
        warnings.warn(
            f"{restarted} states of {type(inner).__name__} have another shape than their parameter, so that "
            "they cannot follow the edit and start anew",
            stacklevel=2,
        )
    _join(inner, model)


def _moved(state: dict[str, Any], before: nn.Parameter, move: Move) -> dict[str, Any] | None:
    moved: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == before.shape:
            moved[key] = move(value).contiguous()
        elif isinstance(value, Tensor) and value.numel() > 1:
            return None
        else:
            moved[key] = value
    return moved


def _join(optimizer: Any, model: nn.Module) -> None:
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = {parameter: number for number, parameter in enumerate(names)}
    groups: list[dict[str, Any]] = optimizer.param_groups
    home: dict[str, int] = {}
    for number, group in enumerate(groups):
        for parameter in group["params"]:
            home.setdefault(_kind(names.get(parameter, "")), number)
    known = {parameter for group in groups for parameter in group["params"]}
    for parameter, name in names.items():
        if parameter.requires_grad and parameter not in known and _PREFIX in name:
            groups[home.get(_kind(name), 0)]["params"].append(parameter)
    for group in groups:
        # Parameters of other models stay where they were, behind these.
        group["params"].sort(key=lambda p: order.get(p, len(order)))


def _kind(name: str) -> str:
    """``router.default.scorer.bias``: what parameters of different layers have in common."""
    return name.rpartition(_PREFIX)[2]
