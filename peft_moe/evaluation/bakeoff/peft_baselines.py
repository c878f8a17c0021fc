"""What PEFT makes of several adapters without peft-moe: static merges, Arrow, X-LoRA, and one wide LoRA.

Every builder takes a fresh base, the experts (name → folder or Hub id) and the method's fields.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, XLoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from ...errors import PeftMoeError

MERGED = "merged"


def merge(base: nn.Module, experts: Mapping[str, str], fields: Mapping[str, Any]) -> PeftModel:
    """Merge all experts into one adapter with PEFT's ``add_weighted_adapter``.

    Args:
        base: a fresh copy.
        experts: name → adapter.
        fields: ``combination_type``; ``weight`` of every expert, or "mean" for 1/experts; ``svd_rank`` as a
            number, or "max" or "sum" of the experts' ranks; further arguments of ``add_weighted_adapter``.

    Raises:
        ValueError: PEFT refuses, for example unequal ranks in most plain combination types.
        PeftMoeError: every expert adapts only some layers, and not the same ones.
    """
    names = list(experts)
    model = PeftModel.from_pretrained(base, experts[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(experts[name], adapter_name=name)
    _put_full_adapter_first(names, model.peft_config)
    arguments = dict(fields)
    weight = arguments.pop("weight", "mean")
    rank = arguments.pop("svd_rank", None)
    if rank is not None:
        configs: Mapping[str, Any] = model.peft_config
        ranks = [_largest_rank(configs[name]) for name in names]
        arguments["svd_rank"] = max(ranks) if rank == "max" else sum(ranks) if rank == "sum" else int(rank)
    if arguments["combination_type"].endswith("svd"):
        # Gives the same numbers without the columns that PEFT cuts off afterwards.
        arguments["svd_full_matrices"] = False
    expert_weight = 1.0 / len(names) if weight == "mean" else float(weight)
    model.add_weighted_adapter(names, [expert_weight] * len(names), MERGED, **arguments)
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and MERGED in layer.scaling:
            # PEFT sets alpha = rank but copies use_rslora of the first adapter, which would scale by √rank.
            layer.scaling[MERGED] = 1.0
    model.set_adapter(MERGED)
    return model


def arrow(base: nn.Module, experts: Mapping[str, str], fields: Mapping[str, Any]) -> PeftModel:
    """Build PEFT's Arrow (arXiv 2405.11157) over all experts. Nothing is fitted or trained.

    Raises:
        ValueError: ranks, shapes or targets differ.
    """
    from peft.tuners.lora.arrow import create_arrow_model
    from peft.tuners.lora.config import ArrowConfig

    arguments = {"rng_seed": 0, **fields}
    arguments["top_k"] = min(arguments.get("top_k", 3), len(experts))
    model: PeftModel = create_arrow_model(
        base,  # type: ignore[arg-type]  # PEFT annotates PreTrainedModel
        list(experts.values()),
        ArrowConfig(**arguments),
    )
    return model


def xlora(base: nn.Module, experts: Mapping[str, str], fields: Mapping[str, Any]) -> PeftModel:
    """Build PEFT's X-LoRA (arXiv 2402.07148) over all experts, with an untrained classifier.

    Raises:
        PeftMoeError: a parameter outside the classifier would train.
    """
    # X-LoRA requires a base without cache, and adapters that are named by number.
    base_config: Any = base.config
    base_config.use_cache = False
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=base_config.get_text_config().hidden_size,
        adapters={str(number): source for number, source in enumerate(experts.values())},
        **fields,
    )
    model: PeftModel = get_peft_model(base, config)
    others = [n for n, p in model.named_parameters() if p.requires_grad and "xlora_classifier" not in n]
    if others:
        raise PeftMoeError(f"X-LoRA would train {others[0]} beside its classifier")
    return model


def wide_lora(base: nn.Module, experts: Mapping[str, str], fields: Mapping[str, Any]) -> PeftModel:
    """Add one fresh LoRA with the sum of the experts' ranks and the union of their target modules.

    Its scaling is the mean of the experts' scalings, alpha/rank or alpha/√rank each.

    Args:
        base: a fresh copy.
        experts: name → adapter; only their configs are read.
        fields: fields of ``LoraConfig`` that override these values.

    Raises:
        PeftMoeError: an expert is not a LoRA adapter, or target modules are patterns, which have no union.
    """
    configs = [PeftConfig.from_pretrained(source) for source in experts.values()]
    loras = [config for config in configs if isinstance(config, LoraConfig)]
    if len(loras) < len(configs):
        raise PeftMoeError("one wide LoRA needs experts that are LoRA adapters")
    rank = sum(_largest_rank(config) for config in loras)
    scalings = [c.lora_alpha / (c.r**0.5 if c.use_rslora else c.r) for c in loras]
    config = LoraConfig(
        **{
            "r": rank,
            "lora_alpha": rank * sum(scalings) / len(scalings),
            "target_modules": sorted(_union_of_targets(loras)),
            "task_type": "CAUSAL_LM",
            **fields,
        }
    )
    model: PeftModel = get_peft_model(base, config)
    return model


def _put_full_adapter_first(names: list[str], configs: Mapping[str, Any]) -> None:
    """Sort an adapter of all layers to the front: PEFT gives the merged adapter the first one's layers."""
    names.sort(key=lambda name: configs[name].layers_to_transform is not None)
    layers = [configs[name].layers_to_transform for name in names]
    if layers[0] is not None and any(other != layers[0] for other in layers):
        raise PeftMoeError(
            f"layers_to_transform={layers} differ: PEFT would keep only those of the first adapter; leave "
            "out the experts that differ, or train them on the same layers"
        )


def _largest_rank(config: LoraConfig) -> int:
    """Return the largest rank that an adapter has in any layer."""
    return max([config.r, *(config.rank_pattern or {}).values()])


def _union_of_targets(configs: Iterable[LoraConfig]) -> set[str]:
    union: set[str] = set()
    for config in configs:
        if config.target_modules is None or isinstance(config.target_modules, str):
            raise PeftMoeError(
                f"target_modules={config.target_modules!r} cannot be united with others; set those of the "
                "wide LoRA: {width: {target_modules: […]}}"
            )
        union |= set(config.target_modules)
    return union
