"""Which experts train, one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from .apply import Editor
from .mixture import Edited
from .optimizer import follow_edit
from .plan import Edit, edited_config, index_of


def freeze_expert(
    model: nn.Module, name: str, *, adapter_name: str | None = None, optimizer: Any = None
) -> Edited:
    """Keep one expert as it is while others train.

    It does not move by a bit: no gradient reaches it, and neither weight decay nor momentum of earlier steps
    of a ``torch.optim`` optimizer move it. It is recorded in the config, hence holds in a loaded mixture.

    Args:
        model: a PeftModel with a mixture.
        name: of the expert.
        adapter_name: which mixture; default: the active one.
        optimizer: goes on with what trains now.

    Raises:
        PeftMoeError: no such expert.
    """
    return _set(model, name, False, False, adapter_name, optimizer)


def unfreeze_expert(
    model: nn.Module,
    name: str,
    *,
    only: bool = False,
    adapter_name: str | None = None,
    optimizer: Any = None,
) -> Edited:
    """Let one expert train, whatever the mixture's ``train_experts`` says; with the router, as always.

    Experts in bf16 or fp16 become float32, which holds the same numbers.

    Args:
        only: freeze all other experts. The rest as in :func:`freeze_expert`.

    Raises:
        PeftMoeError: no such expert.
    """
    return _set(model, name, True, only, adapter_name, optimizer)


def _set(
    model: nn.Module, name: str, trains: bool, only: bool, adapter_name: str | None, optimizer: Any
) -> Edited:
    editor = Editor(model, adapter_name)
    place, config = index_of(name, editor.config, editor.adapter), editor.config
    wanted = [False] * config.num_experts if only else config.trains
    wanted[place] = trains
    default = config.experts_default
    # Only what differs from the mixture's own setting is said of an expert.
    specs = [
        replace(spec, trains=None if one == default else one)
        for spec, one in zip(config.specs(), wanted, strict=True)
    ]
    edit = Edit(tuple(range(len(specs))), tuple(specs))
    config.__dict__.update(edited_config(config, edit).__dict__)
    active = editor.adapter in editor.tuner.active_adapters
    for layer in editor.layers.values():
        weights: list[Any] = [side[editor.adapter].weight for side in (layer.molora_A, layer.molora_B)]
        layer.set_trained(editor.adapter, config.trains)
        for weight in weights:
            weight.requires_grad_(config.experts_train and active and (trains or weight.requires_grad))
    if trains:
        editor.tuner._cast_adapter_dtype(editor.adapter)
    editor.write_digests()
    done = Edited(editor.adapter, config.expert_names)
    if optimizer is not None:
        follow_edit(optimizer, model, done)
    return done
