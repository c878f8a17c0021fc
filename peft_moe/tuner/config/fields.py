"""The fields of a ``MoLoraConfig``, and what follows from them: names, descriptions, which experts train.

The rules of this folder and the model card read these fields. :mod:`.mixture` checks, reads and writes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from ...errors import PeftMoeError
from ...experts.spec import ExpertSpec, source_name
from .routing import RoutingFields

# A field that changes what a saved mixture computes raises this number, and older versions then refuse the
# file. They only warn of any other field that they do not know, which is PEFT's contract.
FORMAT_VERSION = 2  # 2: mixing


@dataclass
class MixtureFields(RoutingFields, PeftConfig):
    """What a mixture is told, unchecked; :class:`~peft_moe.MoLoraConfig` documents and checks the fields."""

    experts: dict[str, str] | list[Any] | int = 4
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    bias: str = "none"
    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    init_weights: bool = True
    train_experts: bool | None = None
    mixing: str = "linear"
    allow_base_mismatch: bool = False
    base_precision: str | None = None
    base_fingerprint: dict[str, Any] | None = None
    verify_experts: bool = True
    weights_digest: str | None = None
    backend: str = "auto"
    format_version: int = FORMAT_VERSION
    # PEFT's name matching asks for this attribute; targeting bare parameters is not offered.
    target_parameters: None = field(default=None, init=False, repr=False)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.experts if isinstance(self.experts, int) else len(self.experts)

    @property
    def expert_names(self) -> list[str]:
        """Names in the mixture's order: the order of the gates' columns."""
        if isinstance(self.experts, int):
            return [f"expert_{index}" for index in range(self.experts)]
        if isinstance(self.experts, dict):
            return list(self.experts)
        return [entry["name"] if isinstance(entry, dict) else source_name(entry) for entry in self.experts]

    @property
    def experts_embedded(self) -> bool:
        """True once the experts are described by records: in injected, saved and loaded configs."""
        return isinstance(self.experts, list) and all(isinstance(entry, dict) for entry in self.experts)

    def records(self) -> list[dict[str, Any]]:
        """Of embedded experts, as they are saved; may be changed in place."""
        entries = self.experts if isinstance(self.experts, list) else []
        return [entry for entry in entries if isinstance(entry, dict)]

    def sources(self) -> dict[str, str]:
        """Name to folder or Hub id, for a config whose experts are still to be read; else empty."""
        if isinstance(self.experts, dict):
            return dict(self.experts)
        if isinstance(self.experts, list) and not self.experts_embedded:
            return {source_name(entry): entry for entry in self.experts}
        return {}

    def specs(self) -> list[ExpertSpec]:
        """Descriptions of fresh or embedded experts.

        Raises:
            PeftMoeError: the experts are adapters that have not been read yet.
        """
        if isinstance(self.experts, int):
            return [
                ExpertSpec(name, r=self.r, lora_alpha=self.lora_alpha, use_rslora=self.use_rslora)
                for name in self.expert_names
            ]
        if not self.experts_embedded:
            raise PeftMoeError("the experts have not been read yet; inject the config into a model first")
        return [ExpertSpec.from_record(record) for record in self.records()]

    @property
    def trains(self) -> list[bool]:
        """Of each expert, whether its own weights train."""
        own = [record.get("trains") for record in self.records()] or [None] * self.num_experts
        return [self.experts_default if one is None else bool(one) for one in own]

    @property
    def experts_train(self) -> bool:
        """Whether any expert's own weights train."""
        return any(self.trains)

    @property
    def experts_default(self) -> bool:
        """Whether experts train of which nothing else is said."""
        if self.train_experts is not None:
            return self.train_experts
        return isinstance(self.experts, int) or (
            self.experts_embedded and all(not record.get("source") for record in self.records())
        )
