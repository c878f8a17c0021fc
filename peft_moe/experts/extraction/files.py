"""The files of an extracted adapter: what PEFT reads, in bytes that do not change from run to run."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig
from torch import Tensor

from ...io.adapter_files import tensor_key, write_lora
from ...io.sources import find_source
from .pairs import ExtractionPlan


def write_adapter(folder: Path, plan: ExtractionPlan, factors: dict[str, Tensor]) -> None:
    """Write both files of the adapter, with patterns where ranks differ."""
    ranks = {key: len(value) for key, value in factors.items() if key.endswith("lora_A.weight")}
    named = {
        pair.name: ranks[tensor_key(pair.name, "A")]
        for pair in plan.taken
        if tensor_key(pair.name, "A") in ranks
    }
    counts: dict[int, int] = {}
    for rank in named.values():
        counts[rank] = counts.get(rank, 0) + 1
    usual = max(counts, key=lambda rank: (counts[rank], -rank))
    others = {name: rank for name, rank in sorted(named.items()) if rank != usual}
    flipped = {pair.transposed for pair in plan.taken if pair.name in named}
    config = LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=_target_names(set(named), plan),
        fan_in_fan_out=flipped == {True},
        base_model_name_or_path=plan.base.name,
        revision=_revision(plan),
        task_type=task_of(plan.class_name),
        inference_mode=True,
    )
    auto_mapping = None
    if config.task_type is None:
        library = f"transformers.models.{plan.base.config['model_type']}"
        auto_mapping = {"base_model_class": plan.class_name, "parent_library": library}
    write_lora(folder, factors, config, auto_mapping)


def _revision(plan: ExtractionPlan) -> str | None:
    return find_source("base", plan.base.location).revision


def _target_names(taken: set[str], plan: ExtractionPlan) -> list[str]:
    """Last parts of names where they mean the same layers, as people write them; else whole names."""
    short = {name.rsplit(".", 1)[-1] for name in taken}
    same = {name for name in plan.view.modules if name.rsplit(".", 1)[-1] in short}
    return sorted(short if same == taken else taken)


def task_of(class_name: str) -> str | None:
    """PEFT's word for what a model of this class does, where an adapter needs no head of its own."""
    if class_name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return None
