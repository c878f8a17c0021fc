"""From the caller's controls to one forward pass: names become numbers, for each active mixture.

Letters: B batch, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...errors import PeftMoeError
from ...routing.context import RoutingContext, current_inputs
from ...routing.controls import NO_EXPERT, ROUTER, Controls, Limits, current_controls, resolve
from ...routing.mixed_batch import named_adapters
from ...routing.model_call import per_row
from ..config.mixture import MoLoraConfig


def limits_of(controls: Controls, adapter: str, config: MoLoraConfig) -> Limits:
    """What the controls mean for one mixture.

    Raises:
        PeftMoeError: an unknown name.
    """
    limits = Limits(temperature=controls.temperature)
    if controls.experts is not None:
        null = bool(config.null_expert)
        named = {
            resolve(name, config.expert_names, adapter=adapter, what="use_experts", nobody=null)
            for name in controls.experts
        }
        limits.null = NO_EXPERT in named
        limits.experts = tuple(sorted(named - {NO_EXPERT}))
    return limits


def fixed_gates(weights: Mapping[str, float], adapter: str, config: MoLoraConfig) -> list[float]:
    """One weight per expert, in the mixture's order.

    Raises:
        PeftMoeError: an unknown name.
    """
    gates = [0.0] * config.num_experts
    for name, weight in weights.items():
        index = resolve(name, config.expert_names, adapter=adapter, what="gates", nobody=False)
        gates[index] = float(weight)
    return gates


def apply_controls(
    context: RoutingContext, mixtures: Mapping[str, MoLoraConfig], given: tuple[int, int] | None
) -> None:
    """Write the running controls into the context of a forward pass that begins.

    Args:
        context: of the pass; gets ``limits`` for each mixture, or ``gates`` where nothing is left to decide.
        mixtures: the active ones, by adapter.
        given: rows and width of the ids that the user gave, see
            :func:`~peft_moe.routing.model_call.read_call`.

    Raises:
        PeftMoeError: names that a mixture does not have, or not one per sequence.
    """
    inputs, controls = current_inputs(), current_controls()
    named = inputs.experts if inputs is not None else None
    if context.gates is not None or not mixtures or (named is None and controls is None):
        return
    if named is None and controls is not None and controls.gates is not None:
        adapter, config = _only(mixtures, "use_gates")
        gates_E = torch.tensor(fixed_gates(controls.gates, adapter, config), dtype=torch.float32)
        context.gates = gates_E[None, None].to(_device(context))
        return
    for adapter, config in mixtures.items():
        context.limits[adapter] = limits_of(controls or Controls(), adapter, config)
    if named is not None:
        _name_rows(named, context, mixtures, controls, given)


def _name_rows(
    named: Sequence[str | None],
    context: RoutingContext,
    mixtures: Mapping[str, MoLoraConfig],
    controls: Controls | None,
    given: tuple[int, int] | None,
) -> None:
    adapter, config = _only(mixtures, "experts")
    names = config.expert_names
    index = [
        ROUTER if name is None else resolve(name, names, adapter=adapter, what="experts", nobody=True)
        for name in named
    ]
    if context.shape is None:
        raise PeftMoeError("experts names one expert per sequence, and this call has no token sequences")
    rows_B = torch.tensor(index, dtype=torch.long, device=_device(context))
    rows_B = per_row(rows_B, context.shape[0], "experts", given)
    fixed = fixed_gates(controls.gates, adapter, config) if controls and controls.gates is not None else None
    if fixed is None and ROUTER in index:
        context.limits[adapter].rows = rows_B
        return
    # Nothing is left for a router to decide, so that none is asked.
    gates_BE = torch.eye(len(names), device=rows_B.device)[rows_B.clamp_min(0)]
    gates_BE = gates_BE * (rows_B >= 0)[:, None]
    if fixed is not None:
        gates_BE = torch.where((rows_B == ROUTER)[:, None], torch.tensor(fixed).to(gates_BE), gates_BE)
    context.gates = gates_BE[:, None]


def _only(mixtures: Mapping[str, MoLoraConfig], what: str) -> tuple[str, MoLoraConfig]:
    if len(mixtures) > 1:
        raise PeftMoeError(
            f"{what} names experts of one mixture, and {sorted(mixtures)} are active; set_adapter() one"
        )
    return next(iter(mixtures.items()))


def _device(context: RoutingContext) -> Any:
    known = (context.input_ids, context.real, context.domains, context.prompt)
    return next((t.device for t in known if t is not None), torch.device("cpu"))


def refuse_company(mixtures: Mapping[str, MoLoraConfig]) -> None:
    """Rows of an FFN part for one mixture only.

    Args:
        mixtures: what runs in this pass.

    Raises:
        PeftMoeError: a mixture with mixing="block" is not alone, or not on all rows of the batch.
    """
    block = next((adapter for adapter, config in mixtures.items() if config.mixing == "block"), None)
    if block is not None and (len(mixtures) > 1 or named_adapters() is not None):
        raise PeftMoeError(
            f"adapter {block!r} mixes whole feed-forward networks (mixing='block'), and cannot run beside "
            "other adapters in one pass, nor on some rows of a batch (adapter_names); set_adapter() one at "
            "a time"
        )


def refuse_unheard(layer_name: str) -> None:
    """A layer that runs outside of the whole model cannot know which rows and names were meant.

    Raises:
        PeftMoeError: somebody set a control.
    """
    inputs = current_inputs()
    said = inputs is not None and (inputs.gates is not None or inputs.experts is not None)
    if said or current_controls() is not None:
        raise PeftMoeError(
            f"{layer_name} runs outside of the whole model (`generate` of an encoder-decoder calls its "
            "encoder so), where gates, masks and experts' names are not heard; call the model itself, or "
            "leave them out"
        )


def refuse_merged(layer_name: str, context: RoutingContext | None) -> None:
    """A merged layer has no gates.

    Raises:
        PeftMoeError: the running pass sets or masks some.
    """
    if context is not None and (context.limits or context.gates is not None):
        raise PeftMoeError(
            f"{layer_name}: its experts are merged into the base, so that no gate can be set or masked; "
            "call unmerge_adapter() first"
        )


def refuse_passing(adapter: str) -> None:
    """What is merged must be there when it is subtracted again, hence no gates that hold for a while.

    Raises:
        PeftMoeError: somebody set a control.
    """
    if current_controls() is not None:
        raise PeftMoeError(
            f"adapter {adapter!r}: gates that are masked or fixed for a while cannot be merged; leave the "
            "`with` block, or remove experts with peft_moe.editing"
        )
