"""``plan_memory``: peak memory of training a router, from the base's config and the adapters' headers."""

from __future__ import annotations

import copy
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..errors import PeftMoeError, near_matches
from ..experts.base_modules import linear_sizes
from ..io.dtypes import NAMED_DTYPES
from ..io.values import is_count
from ..tuner.config.mixture import MoLoraConfig
from ..tuner.layers.linear import MoLoraLayer
from .header_specs import expert_specs
from .meta_base import build_skeleton, find_config, precision_of, weigh
from .traced_step import step_peak

# Bytes per trained number that an optimizer keeps between steps, for float32 weights.
OPTIMIZERS = {"adamw": 8, "adamw_8bit": 2, "adafactor": 0, "sgd": 0}
LOSSES = ("fused", "full")
MIB = 2**20


@dataclass(frozen=True)
class Training:
    """How the router would be trained.

    Attributes:
        batch: sequences per device and step.
        sequence: tokens of each.
        precision: of the base's linear layers: "full" (as ``dtype``), bitsandbytes "nf4", "fp4" or "int8".
            None takes what the base is stored in.
        double_quant: 4-bit scales are quantised as well.
        dtype: of everything else of the base, and of the experts unless their files say otherwise.
        autocast: the trainer's ``bf16=True`` or ``fp16=True``.
        checkpointing: gradient checkpointing, non-reentrant.
        optimizer: "adamw", "adamw_8bit", "adafactor" or "sgd".
        loss: "fused" as TRL's SFTTrainer, which never holds all logits, or "full" as transformers' Trainer.
        device: "cuda" or "cpu".
    """

    batch: int = 1
    sequence: int = 1024
    precision: str | None = None
    double_quant: bool = False
    dtype: str = "bfloat16"
    autocast: str | None = None
    checkpointing: bool = True
    optimizer: str = "adamw"
    loss: str = "fused"
    device: str = "cuda"

    def __post_init__(self) -> None:
        for name in ("batch", "sequence"):
            value = getattr(self, name)
            if not is_count(value):
                raise PeftMoeError(f"{name}={value!r} must be a whole number of at least 1")
        for name, known in (
            ("dtype", NAMED_DTYPES),
            ("optimizer", OPTIMIZERS),
            ("loss", LOSSES),
            ("device", ("cuda", "cpu")),
            ("autocast", (None, "bfloat16", "float16")),
        ):
            value = getattr(self, name)
            if value not in known:
                words = [str(word) for word in known]
                raise PeftMoeError(
                    f"{name}={value!r} is none of {', '.join(words)}.{near_matches(str(value), words)}"
                )


@dataclass
class MemoryPlan:
    """Where the memory of a training step goes, in bytes.

    Attributes:
        parts: bytes by what they are for. They add up to ``total``.
        base, experts, trained: what was planned for: the base, its experts' names, numbers that train.
        training: the settings.
    """

    parts: dict[str, int]
    base: str
    experts: list[str]
    trained: int
    training: Training

    @property
    def total(self) -> int:
        """Peak bytes of tensors; neither Python, libraries nor the CUDA context are among them."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "total": self.total}


def plan_memory(
    base: str | PreTrainedConfig, mixture: MoLoraConfig, training: Training | None = None
) -> MemoryPlan:
    """Estimate the peak memory of training a mixture's router; nothing is loaded.

    The base is built without weights, the mixture put in, and one training step traced: every tensor that
    it would allocate is followed from the operation that makes it until nobody holds it.

    Args:
        base: folder, Hub id or configuration of a causal language model; only ``config.json`` is read.
        mixture: what to train. Of adapters, ``adapter_config.json`` and the headers of the tensors are
            read. Fresh experts (``experts=4, r=16``) stand for adapters of that rank on all linear layers
            (or ``target_modules``); they are planned as frozen unless ``train_experts=True``.
        training: how.

    Raises:
        PeftMoeError: a base, an adapter or a setting that cannot be planned for.
    """
    training = training or Training()
    config = find_config(base)
    precision = precision_of(config, training.precision, training.double_quant)
    skeleton = build_skeleton(config, NAMED_DTYPES[training.dtype], precision)
    weights = weigh(skeleton)
    model, names = _with_mixture(skeleton, mixture, NAMED_DTYPES[training.dtype])
    routers, experts, trained = _count(model)
    peak = step_peak(
        model,
        batch=training.batch,
        sequence=training.sequence,
        loss=training.loss,
        checkpointing=training.checkpointing,
        autocast=NAMED_DTYPES[training.autocast] if training.autocast else None,
        device=training.device,
    )
    parts = {
        f"base, linear layers ({precision.name})": weights["quantised"],
        "base, other weights" if weights["quantised"] else "base": weights["other weights"],
        "experts": experts,
        "routers": routers,
        f"optimizer ({training.optimizer})": trained * OPTIMIZERS[training.optimizer],
        "activations, gradients, logits": peak,
    }
    return MemoryPlan(
        parts={name: size for name, size in parts.items() if size},
        base=base if isinstance(base, str) else config.model_type,
        experts=names,
        trained=trained,
        training=training,
    )


def _with_mixture(skeleton: nn.Module, mixture: MoLoraConfig, dtype: torch.dtype) -> tuple[Any, list[str]]:
    specs, stored = expert_specs(mixture)
    planned = copy.copy(mixture)
    planned.train_experts = mixture.train_experts is True
    planned.experts = [spec.to_record() for spec in specs]
    planned.base_precision = planned.base_fingerprint = None
    if planned.target_modules is None:
        adapted = {
            name
            for name, module in skeleton.named_modules()
            if linear_sizes(module) and any(spec.target_modules and spec.rank_in(name) for spec in specs)
        }
        planned.target_modules = adapted or "all-linear"  # type: ignore[assignment]
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of experts that were never loaded, and the like
        model = get_peft_model(skeleton, planned, autocast_adapter_dtype=False)
    for module in model.modules():
        if isinstance(module, MoLoraLayer):
            for layer_mixture in module.mixtures.values():
                layer_mixture.pending_weights = False
            for factors in (module.molora_A, module.molora_B):
                factors.to(torch.float32 if planned.train_experts else stored or dtype)
    return model, [spec.name for spec in specs]


def _count(model: nn.Module) -> tuple[int, int, int]:
    """Bytes of routers and of experts, and how many numbers train."""
    routers = experts = trained = 0
    for name, tensor in model.named_parameters():
        if "molora_A" in name or "molora_B" in name:
            experts += _bytes(tensor)
        elif "molora_router" in name:
            routers += _bytes(tensor)
        trained += tensor.numel() * tensor.requires_grad
    return routers, experts, trained


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
