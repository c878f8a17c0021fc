"""A mixture with constant gates merged into its base: a plain transformers model.

Letters: E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import PeftMoeError
from ..io.checkpoint import quiet_transformers
from ..routing.context import Routing
from ..tuner.layers.linear import MoLoraLayer
from ..tuner.saving.base_identity import describe_precision
from .base_model import load_on_base, packed_files, take_along
from .gates import constant_gates, shared_gates
from .mixture_tensors import Mixture
from .report import ExportReport


class _Fixed:
    """Stands where a layer looks for a router that reads nothing."""

    reads_input = False

    def __init__(self, gates_E: Tensor) -> None:
        self.gates_E = gates_E

    def __call__(self, x: Tensor) -> Routing:
        return Routing(gates=self.gates_E.to(x.device)[None, None])


def export_merged(
    mixture: Mixture,
    folder: Path,
    report: ExportReport,
    *,
    gates: Mapping[str, float] | None,
    base: str | None,
    dtype: torch.dtype | None,
) -> None:
    """Merge and save, with the tokenizer and the generation config.

    Raises:
        PeftMoeError: gates that depend on the input, a base that is quantised or cannot be found; all of it
            before any weight loads.
    """
    found = constant_gates(mixture, gates, "merged")
    report.gates = shared_gates(mixture, found)
    if mixture.model is not None:
        precision = describe_precision(mixture.model.get_base_model())
        _refuse_quantised(None if precision == "full" else f"the base in memory is quantised ({precision})")
        model = copy.deepcopy(mixture.model)
        beside = str(getattr(mixture.model.get_base_model(), "name_or_path", ""))
    else:
        _refuse_quantised(packed_files(base or mixture.base))
        wide = torch.float32 if dtype == torch.float32 else None  # rounded once, after the merge
        model, beside = load_on_base(mixture, base or mixture.base, wide, report)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if gates is not None and isinstance(layer, MoLoraLayer):
                assert name
                if mixture.adapter in layer.molora_router:
                    layer.molora_router.pop(mixture.adapter)
                layer.mixtures[mixture.adapter].constant_router = _Fixed(found[layer.name])
        merged: Any = model.merge_and_unload(safe_merge=True, adapter_names=[mixture.adapter])
    if dtype is not None:
        merged = merged.to(dtype)
    with quiet_transformers():
        merged.save_pretrained(str(folder))
    for source in (beside, mixture.folder):  # a trainer keeps the tokenizer beside the mixture
        take_along(source, folder)


def _refuse_quantised(found: str | None) -> None:
    if found is None:
        return
    raise PeftMoeError(
        f"{found}: packing the merged weights again would round away a part of what the mixture changes (14 "
        "to 24 % of it in 4 bits). Merge into the base in 16 or 32 bits: export the saved mixture with "
        "--base and its folder or Hub id; or write a LoRA (--to lora) and load that on the quantised base"
    )
