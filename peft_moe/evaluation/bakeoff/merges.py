"""Static merges: PEFT's ``add_weighted_adapter``, as its users call it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from ...errors import PeftMoeError

MERGED = "merged"


def merge(base: nn.Module, experts: Mapping[str, str], fields: Mapping[str, Any]) -> PeftModel:
    """The base with one adapter, merged from all experts.

    Args:
        base: a fresh copy.
        experts: name → adapter.
        fields: ``combination_type``; ``weight`` of every expert, or "mean" for 1/experts; ``svd_rank`` as a
            number, "max" or "sum" of the experts' ranks; further arguments of ``add_weighted_adapter``.

    Raises:
        ValueError: PEFT refuses (unequal ranks in most plain kinds).
        PeftMoeError: every expert adapts some layers only, and not the same ones.
    """
    names = list(experts)
    model = PeftModel.from_pretrained(base, experts[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(experts[name], adapter_name=name)
    _put_widest_first(names, model.peft_config)
    arguments = dict(fields)
    weight = arguments.pop("weight", "mean")
    rank = arguments.pop("svd_rank", None)
    if rank is not None:
        ranks = [widest_rank(model.peft_config[name]) for name in names]  # type: ignore[arg-type]
        arguments["svd_rank"] = max(ranks) if rank == "max" else sum(ranks) if rank == "sum" else int(rank)
    if arguments["combination_type"].endswith("svd"):
        arguments["svd_full_matrices"] = False  # the same numbers, without the columns that are cut anyway
    each = 1.0 / len(names) if weight == "mean" else float(weight)
    model.add_weighted_adapter(names, [each] * len(names), MERGED, **arguments)
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and MERGED in layer.scaling:
            # PEFT writes alpha = rank but copies use_rslora of the first adapter, which would give √rank.
            layer.scaling[MERGED] = 1.0
    model.set_adapter(MERGED)
    return model


def _put_widest_first(names: list[str], configs: Mapping[str, Any]) -> None:
    """PEFT gives the merged adapter the layers of the first one: begin with one that has them all."""
    names.sort(key=lambda name: configs[name].layers_to_transform is not None)
    layers = [configs[name].layers_to_transform for name in names]
    if layers[0] is not None and any(other != layers[0] for other in layers):
        raise PeftMoeError(
            f"layers_to_transform={layers} differ: PEFT would keep those of the first adapter alone"
        )


def widest_rank(config: LoraConfig) -> int:
    """The largest rank of an adapter in any layer."""
    return max([config.r, *(config.rank_pattern or {}).values()])
