"""A plain LoRA adapter on disk, as PEFT reads it: config, weights, card.

Letters: I in, O out, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from .hub import CARD_FILE, is_on_hub
from .json_files import write_json
from .sources import CONFIG_FILE, WEIGHTS_FILE

PREFIX = "base_model.model."
"""What PEFT puts before the name of a base module."""
Factors = Mapping[str, tuple[Tensor, Tensor]]
"""A [r, I] and B [O, r] by module name."""


def tensor_key(module: str, side: str) -> str:
    """Return the key of ``lora_A`` or ``lora_B`` of a base module in PEFT's adapter files."""
    return f"{PREFIX}{module}.lora_{side}.weight"


def lora_fields(factors: Factors, scaling: float) -> dict[str, Any]:
    """Fields of a ``LoraConfig`` for factors whose product is multiplied by ``scaling`` in every module.

    ``r`` is the largest rank and ``lora_alpha/r`` the scaling, so that a reader which knows no patterns
    scales rightly too.
    """
    ranks = {name: len(A_rI) for name, (A_rI, _) in sorted(factors.items())}
    widest = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != widest}
    patterns = {_exact(name, ranks): rank for name, rank in others.items()}
    return {
        "r": widest,
        "lora_alpha": _plain(scaling * widest),
        "rank_pattern": patterns,
        "alpha_pattern": {name: _plain(scaling * rank) for name, rank in patterns.items()},
        "target_modules": sorted(ranks),
    }


def write_adapter(
    folder: Path,
    factors: Factors,
    fields: Mapping[str, Any],
    *,
    card: str,
    extras: Mapping[str, Tensor] | None = None,
) -> None:
    """All files of one adapter.

    Args:
        folder: an empty one.
        factors: its weights.
        fields: of its ``LoraConfig``.
        card: text of its README.md.
        extras: further tensors, by the names that PEFT gives them.
    """
    tensors = {
        tensor_key(name, side): factor.detach().cpu().contiguous()
        for name, pair in factors.items()
        for side, factor in zip("AB", pair, strict=True)
    }
    tensors |= {name: value.detach().cpu().contiguous() for name, value in (extras or {}).items()}
    # A copy of each: slabs of one tensor share its memory, which a file cannot.
    tensors = {name: value.clone() for name, value in sorted(tensors.items())}
    auto_mapping = fields.get("auto_mapping")
    config = LoraConfig(inference_mode=True, **{k: v for k, v in fields.items() if k != "auto_mapping"})
    write_lora(folder, tensors, config, auto_mapping)
    base = config.base_model_name_or_path
    data = ModelCardData(library_name="peft", tags=["lora"], base_model=base if is_on_hub(base) else None)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{card.strip()}\n").save(folder / CARD_FILE)


def write_lora(
    folder: Path, tensors: Mapping[str, Tensor], config: LoraConfig, auto_mapping: Mapping[str, str] | None
) -> None:
    """Write the two files that PEFT reads, in bytes that depend on their content alone.

    Args:
        folder: an existing one.
        tensors: by the names that PEFT gives them, each with memory of its own.
        config: of the adapter.
        auto_mapping: the class of the base, where the config names no task.
    """
    save_file(dict(sorted(tensors.items())), str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}  # type: ignore[no-untyped-call]  # untyped, PEFT's
    if auto_mapping:
        values["auto_mapping"] = dict(auto_mapping)
    write_json(folder / CONFIG_FILE, values, indent=2, strict=True)


def _exact(name: str, names: Mapping[str, Any]) -> str:
    """A pattern of one module; anchored where it would match the end of another one's name, too."""
    return f"^{name}" if any(other.endswith(f".{name}") for other in names) else name


def _plain(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number
