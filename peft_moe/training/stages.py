"""Joint and staged training: fresh experts beside trained ones, and which experts train in a stage."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from ..editing import freeze_expert, unfreeze_expert
from ..errors import PeftMoeError, near_matches
from ..tuner.layers.shared_router import named_routers
from .trainers.checks import mixture_config

TRAINS = ("all", "own", "own_and_shared")


def write_fresh_experts(
    base: Any, experts: Mapping[str, str | None], lora: LoraConfig, folder: Path, seed: int
) -> dict[str, str]:
    """Write a fresh adapter for every expert without one; a fresh adapter adds nothing to the base.

    Args:
        base: the base model without adapters; it is unchanged afterwards.
        experts: folder or Hub id of each expert's adapter, by name; None for a fresh one.
        lora: config of the fresh adapters.
        folder: parent of the fresh adapters' folders, which have the experts' names.
        seed: of the first fresh adapter; each further one adds 1.

    Returns:
        A folder or Hub id for every expert, by name.

    Raises:
        PeftMoeError: there is no expert, or fresh experts lack target modules.
    """
    if not experts:
        raise PeftMoeError("experts is empty; name at least one, with its adapter or null for a fresh one")
    sources = {name: os.path.expandvars(source) for name, source in experts.items() if source is not None}
    fresh = [name for name in experts if name not in sources]
    if fresh and not lora.target_modules:
        raise PeftMoeError(f"fresh experts {fresh} need lora_target_modules: which layers they adapt")
    for number, name in enumerate(fresh):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + number)
            model: Any = get_peft_model(base, lora)
        model.save_pretrained(str(folder / name))
        model.unload()
        if hasattr(base, "peft_config"):
            del base.peft_config
        sources[name] = str(folder / name)
    return {name: sources[name] for name in experts}


def set_stage(model: nn.Module, domains: Sequence[str], trains: str) -> list[str]:
    """Freeze and unfreeze experts and routers for a stage of training.

    Args:
        model: a PeftModel with a mixture.
        domains: domains of the stage; a domain's expert has the domain's name.
        trains: "all": all experts and the routers train. "own": only the experts of ``domains``.
            "own_and_shared": these and the shared experts. The routers are frozen in the last two.

    Returns:
        Names of the experts that train in this stage.

    Raises:
        PeftMoeError: ``trains`` is unknown, or a domain has no expert.
    """
    if trains not in TRAINS:
        raise PeftMoeError(
            f"trains={trains!r} is not one of {', '.join(TRAINS)}.{near_matches(trains, TRAINS)}"
        )
    adapter, config = mixture_config(model)
    names = list(config.expert_names)
    if trains != "all":
        missing = [domain for domain in domains if domain not in config.routed_names]
        if missing:
            raise PeftMoeError(
                f"trains={trains!r}: the domain {missing[0]!r} has no routed expert of its name; there are "
                f"{config.routed_names}. Take trains='all', or leave the domain out of the stages"
            )
        names = [
            n for n in names if n in domains or (trains == "own_and_shared" and n in config.shared_experts)
        ]
    for name in config.expert_names:
        (unfreeze_expert if name in names else freeze_expert)(model, name)
    for _, router in named_routers(model, adapter):
        for parameter in router.parameters():
            parameter.requires_grad_(trains == "all" and router.trainable)
    return names
