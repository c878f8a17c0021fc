"""Each expert back as an ordinary PEFT LoRA adapter, bit for bit.

Letters: I in, O out, r rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..experts.spec import ExpertSpec
from ..io.adapter_files import write_adapter
from ..tuner.config.model_card import UNKNOWN, base_license
from .lora import beside
from .mixture_tensors import Mixture
from .report import ExportReport


def export_adapters(mixture: Mixture, folder: Path, report: ExportReport) -> None:
    """Write every expert into a folder of its own, named after it.

    Tensors and scales are those that the adapter came with: r, alpha, rsLoRA and patterns stand in its config
    as they did, nothing is folded.
    """
    whole = _is_whole(mixture)
    for index, spec in enumerate(mixture.specs):
        factors = {}
        for module, ranks in mixture.layers.items():
            if ranks.ranks[index]:
                A_rI, B_rO = mixture.expert(module, index)
                factors[module] = narrowed((A_rI, B_rO.T), spec.dtype)
        if not factors:
            report.notes.append(f"Expert {spec.name!r} adapts no module of this mixture, and was left out.")
            continue
        inside = folder / spec.name
        inside.mkdir()
        write_adapter(
            inside, factors, _fields(mixture, spec, sorted(factors), whole), card=_card(mixture, spec)
        )
    if not whole:
        report.notes.append(
            "The mixture may adapt fewer modules than its experts did (target_modules, exclude_modules, or "
            "the layers below a tap with router_below_tap='base'): the adapters hold what is in it."
        )
    if mixture.extras():
        report.notes.append(
            f"{len(mixture.extras())} tensors that were trained beside the experts (biases, whole modules) "
            "belong to no expert, and were left out."
        )


def narrowed(pair: tuple[Tensor, Tensor], dtype: str | None) -> tuple[Tensor, Tensor]:
    """Factors in the dtype that the adapter came in, if that holds the same numbers."""
    if dtype is None:
        return pair
    own = getattr(torch, dtype)
    A, B = (one.to(own) for one in pair)
    same = all(torch.equal(n.to(w.dtype), w) for n, w in zip((A, B), pair, strict=True))
    return (A, B) if same else pair


def _fields(mixture: Mixture, spec: ExpertSpec, modules: list[str], whole: bool) -> dict[str, Any]:
    fields = {
        "r": spec.r,
        "lora_alpha": spec.lora_alpha,
        "use_rslora": spec.use_rslora,
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": dict(spec.alpha_pattern),
        "fan_in_fan_out": spec.fan_in_fan_out,
        "base_model_name_or_path": spec.base_model or mixture.base,
        **{key: beside(mixture)[key] for key in ("task_type", "auto_mapping")},
    }
    if spec.target_modules is None or not whole:
        return {**fields, "target_modules": modules}
    return {
        **fields,
        "target_modules": spec.target_modules,
        "exclude_modules": spec.exclude_modules,
        "layers_to_transform": spec.layers_to_transform,
        "layers_pattern": spec.layers_pattern,
    }


def _is_whole(mixture: Mixture) -> bool:
    """Whether the mixture surely adapts every module that its experts did."""
    config, targets = mixture.config, mixture.config.target_modules
    if config.router_scope == "model" and config.router_below_tap == "base":
        return False
    if config.exclude_modules or config.layers_to_transform is not None or isinstance(targets, str):
        return False
    # Left open, the targets became the union of the experts' modules, which PEFT may have shortened since.
    names = set(targets or ())
    return set(mixture.layers) <= names or all(_covers(names, spec.target_modules) for spec in mixture.specs)


def _covers(names: set[str], targets: list[str] | str | None) -> bool:
    """Whether whatever an expert's ``target_modules`` match is matched by these names too."""
    if not isinstance(targets, list):
        return targets is None
    return all(any(one == name or one.endswith(f".{name}") for name in names) for one in targets)


def _card(mixture: Mixture, spec: ExpertSpec) -> str:
    base = spec.base_model or mixture.base
    return (
        f"# {spec.name}\n\nAn ordinary PEFT LoRA adapter, taken out of a peft-moe mixture as it went in.\n\n"
        f"- source: {f'`{Path(spec.source).name}`' if spec.source else 'trained in the mixture'}\n"
        f"- licence: {spec.license or UNKNOWN}\n- base: `{base or UNKNOWN}`; licence: {base_license(base)}\n"
    )
