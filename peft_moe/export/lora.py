"""A mixture with constant gates as one plain LoRA.

Letters: I in, O out, R total rank, K ranks that are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import PeftMoeError
from ..io.adapter_files import lora_fields, write_adapter
from ..tuner.config.model_card import base_license, experts_table
from .fold_gates import cut, distance, fold, product_norm, scaled_ranks
from .gates import constant_gates, shared_gates
from .mixture_tensors import Mixture
from .report import ExportReport


class Folded:
    """One plain LoRA that a mixture amounts to, not yet written.

    Args:
        mixture: what is exported.
        gates: [E] for each module.
        rank: at most so many ranks in each module, by SVD; None keeps all, which is exact.
        dtype: of the factors; None takes the experts' own where that is exact, else float32.

    Attributes:
        factors: A [K, I] and B [O, K] by module.
        scaling: what their product is multiplied by, in every module.
        fields: of its ``LoraConfig``.
    """

    def __init__(
        self,
        mixture: Mixture,
        gates: Mapping[str, Tensor],
        *,
        rank: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.mixture, self.rank, self.dtype = mixture, rank, dtype
        scales = {m: scaled_ranks(gates[m], ranks) for m, ranks in mixture.layers.items()}
        kept = {s for scales_R in scales.values() for s in scales_R.unique().tolist() if s}  # type: ignore[no-untyped-call]  # untyped, torch's
        if not kept:
            raise PeftMoeError(f"every gate of {mixture.label} is 0, which is the base alone")
        # One scale for all of them can stand in alpha: then no number of the experts changes.
        shared = kept.pop() if len(kept) == 1 and rank is None else None
        self.scaling = 1.0 if shared is None else shared
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._squares: dict[str, tuple[float, float]] = {}
        for module, scales_R in scales.items():
            if bool((scales_R != 0).any()):
                self.factors[module] = self._fold(module, scales_R, shared)
        self.fields = {**lora_fields(self.factors, self.scaling), **beside(mixture)}

    def _fold(self, module: str, scales_R: Tensor, shared: float | None) -> tuple[Tensor, Tensor]:
        A_RI, B_RO = self.mixture.factors(module)
        A_KI, B_OK = fold(A_RI, B_RO, scales_R.to(A_RI.device), shared)
        wide = torch.promote_types(A_RI.dtype, torch.float64)
        kept_R = (scales_R != 0).to(A_RI.device)
        exact = A_KI.to(wide), B_RO[kept_R].to(wide).T * scales_R[scales_R != 0].to(B_RO.device, wide)
        if self.rank is not None and len(A_KI) > self.rank:
            A_KI, B_OK = (
                one.to(torch.promote_types(A_RI.dtype, torch.float32)) for one in cut(*exact, self.rank)
            )
        if self.dtype is not None:
            A_KI, B_OK = A_KI.to(self.dtype), B_OK.to(self.dtype)
            if not all(bool(torch.isfinite(one).all()) for one in (A_KI, B_OK)):
                raise PeftMoeError(
                    f"dtype={str(self.dtype)[6:]!r} overflows in {module}; use 'bfloat16' or 'float32'"
                )
        error = distance(*exact, A_KI, B_OK.double() * self.scaling)
        self._squares[module] = error**2, product_norm(*exact) ** 2
        return A_KI, B_OK

    @property
    def error(self) -> float:
        """‖ΔW' − ΔW‖ / ‖ΔW‖ over all modules."""
        wrong, whole = (sum(column) for column in zip(*self._squares.values(), strict=True))
        return float((wrong / whole) ** 0.5) if whole else 0.0

    @property
    def module_errors(self) -> dict[str, float]:
        """The same by module."""
        return {m: (wrong / whole) ** 0.5 if whole else 0.0 for m, (wrong, whole) in self._squares.items()}


def beside(mixture: Mixture) -> dict[str, Any]:
    """Fields of a ``LoraConfig`` that say what the adapter belongs to and carries beside its factors."""
    config = mixture.config
    return {
        "base_model_name_or_path": mixture.base,
        "revision": getattr(config, "revision", None),
        "task_type": config.task_type,
        "auto_mapping": config.auto_mapping,
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": config.trainable_token_indices,
        "bias": "lora_only" if config.bias == "molora_only" else config.bias,
        "fan_in_fan_out": any(spec.fan_in_fan_out for spec in mixture.specs),
    }


def export_lora(
    mixture: Mixture,
    folder: Path,
    report: ExportReport,
    *,
    gates: Mapping[str, float] | None,
    rank: int | None,
    dtype: torch.dtype | None,
) -> None:
    """Write the LoRA of a mixture with constant gates."""
    found = constant_gates(mixture, gates, "lora")
    made = Folded(mixture, found, rank=rank, dtype=dtype)
    report.gates = shared_gates(mixture, found)
    report.rank, report.error = made.fields["r"], made.error
    if rank is not None:
        report.module_errors = made.module_errors
    if made.scaling == 1.0 and rank is None:
        report.notes.append("Gates and scalings are folded into B; every module's own scaling is 1.")
    elif rank is None:
        report.notes.append(
            f"A and B are the experts' own numbers; gate times scaling is {made.scaling:.6g}."
        )
    write_adapter(folder, made.factors, made.fields, card=lora_card(mixture, report), extras=mixture.extras())


def lora_card(mixture: Mixture, report: ExportReport) -> str:
    """Text of the README.md of a LoRA that was made of a mixture."""
    table = "\n".join(experts_table(mixture.config))
    told = "\n".join(f"- {line}" for line in report.lines())
    return (
        f"# One LoRA of {mixture.config.num_experts} experts ({report.kind})\n\n"
        f"An ordinary PEFT LoRA adapter, exported from a peft-moe mixture.\n\n{told}\n\n"
        f"Base: `{mixture.base or 'unknown'}`; licence: {base_license(mixture.base)}.\n\n{table}\n"
    )
