"""The files of an extracted adapter: what PEFT reads, in bytes that do not change from run to run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from peft_moe.experts.extraction.pairs import ExtractionPlan
from peft_moe.experts.tensor_checks import tensor_key
from peft_moe.io.sources import CONFIG_FILE, WEIGHTS_FILE, find_source


def write_adapter(folder: Path, plan: ExtractionPlan, factors: dict[str, Tensor]) -> None:
    """Both files of the adapter; patterns where ranks differ, so that PEFT reads them again."""
    save_file(dict(sorted(factors.items())), str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
    ranks = {key: len(value) for key, value in factors.items() if key.endswith("lora_A.weight")}
    named = {
        pair.name: ranks[tensor_key(pair.name, "A")]
        for pair in plan.taken
        if tensor_key(pair.name, "A") in ranks
    }
    counts: dict[int, int] = {}
    for one in named.values():
        counts[one] = counts.get(one, 0) + 1
    usual = max(counts, key=lambda one: (counts[one], -one))
    others = {name: one for name, one in sorted(named.items()) if one != usual}
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
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    if values["task_type"] is None:
        library = f"transformers.models.{plan.base.config['model_type']}"
        values["auto_mapping"] = {"base_model_class": plan.class_name, "parent_library": library}
    write_json(folder / CONFIG_FILE, values)


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


def write_json(path: Path, values: dict[str, Any]) -> None:
    """JSON with sorted keys; numbers that are not finite raise."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
