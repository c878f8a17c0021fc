"""What a mixture knows of one expert: names, shapes and scale, never tensors.

A spec is recorded in ``adapter_config.json``, so that a saved mixture can rebuild its layers
without the adapters that it was made from. Its field names are PEFT's own, which lets PEFT's
matching of ``target_modules``, ``rank_pattern`` and ``alpha_pattern`` run on a spec as on a
``LoraConfig``.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

# Names are keys of files and folders, and parts of module names.
NAME_RULE = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
# Words that a saved mixture, PEFT or torch's ModuleDict already uses for something else.
RESERVED_NAMES = frozenset(
    ("null", "base", "__base__", "lora_a", "lora_b", "weight", "bias", "keys", "values", "items")
)
_AT_A_REVISION = re.compile(r"(?P<id>[^/@]+/[^/@]+)@.+")


def source_name(source: str) -> str:
    """What an expert is called that was given without a name: the last part of its folder or Hub id."""
    hub = _AT_A_REVISION.fullmatch(source)  # revisions may hold slashes (refs/pr/1)
    return (hub["id"] if hub else source).rstrip("/").split("/")[-1].split("@")[0]


@dataclass
class ExpertSpec:
    """One LoRA expert.

    Attributes:
        name: the expert's name in the mixture.
        source: folder or Hub id that it was read from; None for a fresh expert.
        revision: Hub revision that was asked for.
        sha256: of the ``adapter_model.safetensors`` that was read; None for a fresh expert.
        digest: of the weights as they are in the mixture, see ``integrity.expert_digests``; None for
            experts that train.
        base_model: the base that the adapter says it was trained on.
        license: what the adapter's own card says; None if it has none, or says nothing.
        dtype: of the adapter's tensors, where the mixture keeps them in a wider one.
        r, lora_alpha, use_rslora, rank_pattern, alpha_pattern: as in ``LoraConfig``.
        target_modules, exclude_modules, layers_to_transform, layers_pattern: as in ``LoraConfig``.
        fan_in_fan_out: as in ``LoraConfig``; the mixture finds out by itself, PEFT asks for it.
        trains: whether this expert's own weights train; None follows the mixture's ``train_experts``.
    """

    name: str
    source: str | None = None
    revision: str | None = None
    sha256: str | None = None
    digest: str | None = None
    base_model: str | None = None
    license: str | None = None
    dtype: str | None = None
    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    fan_in_fan_out: bool = False
    trains: bool | None = None

    def rank_in(self, module_name: str) -> int:
        """Rank of this expert in the base's module ``module_name``; 0 if it does not adapt it."""
        # A fresh expert has no targets of its own: it goes wherever the mixture goes.
        if self.target_modules is not None and not check_target_module_exists(self, module_name):
            return 0
        return int(self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), module_name), self.r))

    def scaling_in(self, module_name: str) -> float:
        """What the expert's B·A is multiplied by: α/r, or α/√r with rsLoRA (arXiv 2312.03732)."""
        rank = int(self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), module_name), self.r))
        alpha = self.alpha_pattern.get(
            get_pattern_key(list(self.alpha_pattern), module_name), self.lora_alpha
        )
        return float(alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def to_record(self) -> dict[str, Any]:
        """Plain JSON data; fields at their default are left out."""
        default = ExpertSpec(self.name)
        return {
            key: value
            for key, value in asdict(self).items()
            if key == "name" or value != getattr(default, key)
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> ExpertSpec:
        """The inverse of :meth:`to_record`. Unknown fields raise: they could change the maths."""
        unknown = set(record) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"expert record {record.get('name')!r} has unknown fields {sorted(unknown)}")
        return cls(**record)
