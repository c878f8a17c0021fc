"""From the caller's controls to one forward pass: names become numbers, for each active mixture.

Letters: B batch, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...errors import PeftMoeError
from ...routing.context import (
    Controls,
    Request,
    RoutingConstraints,
    RoutingContext,
    current_request,
)
from ...routing.controls import NO_EXPERT, ROUTER, resolve
from ...routing.model_call import per_row
from ..config.mixture import MoLoraConfig


def constraints_of(controls: Controls, adapter: str, config: MoLoraConfig) -> RoutingConstraints:
    """What the controls mean for the routers of one mixture, in numbers.

    Raises:
        PeftMoeError: an unknown name.
    """
    settings = config.router_settings()
    constraints = RoutingConstraints()
    if controls.temperature is not None:
        constraints.score_scale = settings.temperature / controls.temperature
    if controls.experts is None:
        return constraints
    allowed = [
        resolve(name, config.expert_names, adapter=adapter, argument="use_experts", null=settings.null_expert)
        for name in controls.experts
    ]
    masked = [column for column, expert in enumerate(settings.routed) if expert not in allowed]
    if settings.null_expert and NO_EXPERT not in allowed:
        masked.append(settings.num_columns - 1)
    constraints.masked_columns = tuple(masked)
    constraints.masked_shared = tuple(expert for expert in settings.shared if expert not in allowed)
    return constraints


def fixed_gates(weights: Mapping[str, float], adapter: str, config: MoLoraConfig) -> list[float]:
    """One weight per expert, in the mixture's order.

    Raises:
        PeftMoeError: an unknown name.
    """
    gates = [0.0] * config.num_experts
    for name, weight in weights.items():
        index = resolve(name, config.expert_names, adapter=adapter, argument="gates", null=False)
        gates[index] = float(weight)
    return gates


def apply_controls(context: RoutingContext, request: Request, mixtures: Mapping[str, MoLoraConfig]) -> None:
    """Write the caller's controls into the context of a forward pass that begins.

    Args:
        context: of the pass; gets ``constraints`` for each mixture, or ``gates`` if no router has to decide.
        request: what the caller asks for.
        mixtures: the active ones, by adapter.

    Raises:
        PeftMoeError: names that a mixture does not have, or not one per sequence.
    """
    controls = request.controls
    row_experts = request.inputs.experts if request.inputs is not None else None
    if context.gates is not None or not mixtures or (row_experts is None and controls is None):
        return
    if row_experts is None and controls is not None and controls.gates is not None:
        adapter, config = _only(mixtures, "use_gates")
        gates_E = torch.tensor(fixed_gates(controls.gates, adapter, config), dtype=torch.float32)
        context.gates = gates_E[None, None].to(_device(context))
        return
    for adapter, config in mixtures.items():
        context.constraints[adapter] = constraints_of(controls or Controls(), adapter, config)
    if row_experts is not None:
        _name_rows(row_experts, context, mixtures, controls)


def _name_rows(
    row_experts: Sequence[str | None],
    context: RoutingContext,
    mixtures: Mapping[str, MoLoraConfig],
    controls: Controls | None,
) -> None:
    """Give each row the expert that the caller names for it."""
    adapter, config = _only(mixtures, "experts")
    names = config.expert_names
    index = [
        ROUTER if name is None else resolve(name, names, adapter=adapter, argument="experts", null=True)
        for name in row_experts
    ]
    if context.shape is None:
        raise PeftMoeError("experts names one expert per sequence, and this call has no token sequences")
    prompt_shape = context.generation.prompt_shape if context.generation is not None else None
    rows_B = torch.tensor(index, dtype=torch.long, device=_device(context))
    rows_B = per_row(rows_B, context.shape[0], "experts", prompt_shape)
    fixed = fixed_gates(controls.gates, adapter, config) if controls and controls.gates is not None else None
    if fixed is None and ROUTER in index:
        context.constraints[adapter].rows = rows_B
        return
    # No row is left for a router to decide, so that no router is asked.
    gates_BE = torch.eye(len(names), device=rows_B.device)[rows_B.clamp_min(0)]
    gates_BE = gates_BE * (rows_B >= 0)[:, None]
    if fixed is not None:
        gates_BE = torch.where((rows_B == ROUTER)[:, None], torch.tensor(fixed).to(gates_BE), gates_BE)
    context.gates = gates_BE[:, None]


def _only(mixtures: Mapping[str, MoLoraConfig], argument: str) -> tuple[str, MoLoraConfig]:
    if len(mixtures) > 1:
        raise PeftMoeError(
            f"{argument} names experts of one mixture, and {sorted(mixtures)} are active; set_adapter() one"
        )
    return next(iter(mixtures.items()))


def _device(context: RoutingContext) -> Any:
    tensors = (context.input_ids, context.real, context.domains, context.prompt)
    return next((t.device for t in tensors if t is not None), torch.device("cpu"))


def refuse_company(mixtures: Mapping[str, MoLoraConfig], row_adapters: Sequence[str] | None) -> None:
    """Refuse what a mixture of whole feed-forward networks cannot share a pass with.

    Args:
        mixtures: what runs in this pass.
        row_adapters: an adapter for each row of the batch, if there is one.

    Raises:
        PeftMoeError: a mixture with mixing="block" is not alone, or not on all rows of the batch.
    """
    block = next((adapter for adapter, config in mixtures.items() if config.mixing == "block"), None)
    if block is not None and (len(mixtures) > 1 or row_adapters is not None):
        raise PeftMoeError(
            f"adapter {block!r} mixes whole feed-forward networks (mixing='block'), and cannot run beside "
            "other adapters in one pass, nor on some rows of a batch (adapter_names); set_adapter() one at "
            "a time"
        )


def refuse_controls(layer_name: str) -> None:
    """Refuse gates, masks and names for a layer that runs outside of the whole model: it cannot apply them.

    Raises:
        PeftMoeError: the caller asks for some.
    """
    request = current_request()
    inputs = request.inputs
    steered = inputs is not None and (inputs.gates is not None or inputs.experts is not None)
    if steered or request.controls is not None:
        raise PeftMoeError(
            f"{layer_name} runs outside of the whole model (`generate` of an encoder-decoder calls its "
            "encoder so), where gates, masks and experts' names are not heard; call the model itself, or "
            "leave them out"
        )


def refuse_merged(layer_name: str, context: RoutingContext | None) -> None:
    """Refuse gates and masks for a merged layer, which has no gates.

    Raises:
        PeftMoeError: the running pass sets or masks some.
    """
    if context is not None and (context.constraints or context.gates is not None):
        raise PeftMoeError(
            f"{layer_name}: its experts are merged into the base, so that no gate can be set or masked; "
            "call unmerge_adapter() first"
        )


def refuse_passing(adapter: str) -> None:
    """Refuse a merge under controls: the merge must find the same gates when it is undone.

    Raises:
        PeftMoeError: the caller set a control.
    """
    if current_request().controls is not None:
        raise PeftMoeError(
            f"adapter {adapter!r}: gates that are masked or fixed for a while cannot be merged; leave the "
            "`with` block, or remove experts with peft_moe.editing"
        )
