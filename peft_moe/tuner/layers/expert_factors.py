"""The factors of each layer's experts: fresh, read from adapters, or loaded later from a saved mixture.

Letters: I in, O out, R total rank.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from transformers.utils import logging

from ...errors import PeftMoeError
from ...experts.adapter import ExpertFile, open_experts
from ...experts.spec import ExpertSpec
from ...ops import RankMap
from ..config.mixture import MoLoraConfig

# Seconds before a progress bar is shown. Small mixtures are read faster.
PATIENCE = 1.0


@dataclass
class ExpertPlan:
    """The experts of one injection, and where their factors come from.

    Attributes:
        specs: the experts, in the mixture's order.
        files: their opened adapters; empty if they are fresh or embedded.
        pending_weights: the weights come later, from a saved mixture.
        init_weights: fresh experts start with B = 0.
        bar: the progress bar over layers, shown where reading takes long.
    """

    specs: list[ExpertSpec]
    files: list[ExpertFile] = field(default_factory=list)
    pending_weights: bool = False
    init_weights: bool = True
    bar: Any = None

    def rank_map(self, module_name: str) -> RankMap:
        """Return which rank of the module belongs to which expert."""
        return RankMap(
            tuple(spec.rank_in(module_name) for spec in self.specs),
            tuple(spec.scaling_in(module_name) for spec in self.specs),
        )

    def factors(
        self, module_name: str, ranks: RankMap, in_features: int, out_features: int
    ) -> tuple[Tensor, Tensor]:
        """Return A [R, I] and B [R, O] of one module, whose ranks are ``ranks``.

        Experts of different dtypes share the widest one, which represents all of them exactly.
        """
        if self.files:
            if self.bar is not None:
                self.bar.update()
            return self._read(module_name, in_features, out_features)
        if self.pending_weights:
            return (
                torch.full((ranks.total, in_features), torch.nan),
                torch.full((ranks.total, out_features), torch.nan),
            )
        return _fresh_factors(ranks.total, in_features, out_features, zero=self.init_weights)

    def _read(self, module_name: str, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
        # Each pair is copied into its slab right after it is read, so that a layer is never in memory twice.
        files = [f for f in self.files if f.spec.rank_in(module_name)]
        dtype, total = files[0].dtype(module_name), 0
        for file in files:
            dtype = torch.promote_types(dtype, file.dtype(module_name))
            total += file.spec.rank_in(module_name)
        with torch.device("cpu"):
            A_RI, B_RO = (
                torch.empty(total, in_features, dtype=dtype),
                torch.empty(total, out_features, dtype=dtype),
            )
        start = 0
        for file in files:
            a, b = file.read(module_name)
            A_RI[start : start + len(a)], B_RO[start : start + len(a)] = a, b.T
            start += len(a)
        return A_RI, B_RO

    def close(self) -> None:
        """Close the adapters' files. The factors have been copied."""
        if self.bar is not None:
            self.bar.close()
        for file in self.files:
            file.close()


def _fresh_factors(rank: int, in_features: int, out_features: int, *, zero: bool) -> tuple[Tensor, Tensor]:
    # PEFT's LoRA starts like this: A is random and B is zero, so that the mixture starts as the base.
    A_RI, B_RO = torch.empty(rank, in_features), torch.zeros(rank, out_features)
    nn.init.kaiming_uniform_(A_RI, a=math.sqrt(5))
    if not zero:
        nn.init.kaiming_uniform_(B_RO, a=math.sqrt(5))
    return A_RI, B_RO


def plan_experts(config: MoLoraConfig, base: nn.Module) -> ExpertPlan:
    """Open, check and describe the experts of a config, without changing the base.

    A config with adapters is changed in place: ``experts`` becomes the records of the adapters, and
    ``target_modules``, if it is None, the union of the modules that they adapt.

    Raises:
        PeftMoeError: an adapter does not fit; see :func:`open_experts`.
    """
    sources = config.sources()
    if not sources:
        plan = ExpertPlan(
            config.specs(), pending_weights=config.experts_embedded, init_weights=config.init_weights
        )
        _record(config, plan)
        return plan
    files = open_experts(sources, base, allow_base_mismatch=config.allow_base_mismatch)
    plan = ExpertPlan([f.spec for f in files], files=files)
    adapted = {module for f in files for module in f.modules}
    # The bar of transformers, so that its disable_progress_bar() silences this one as well.
    title = f"Reading {len(files)} experts"
    plan.bar = logging.tqdm(total=len(adapted), desc=title, unit="layer", delay=PATIENCE)
    if config.target_modules is None:
        config.target_modules = adapted  # type: ignore[assignment]  # PEFT keeps targets as a set
    elif config.target_modules != "all-linear":
        _warn_left_out(config, files)
    _record(config, plan)
    return plan


def _record(config: MoLoraConfig, plan: ExpertPlan) -> None:
    for spec, trains in zip(plan.specs, config.trains, strict=True):
        if trains:
            spec.digest = None  # the first training step changes the weights
    config.train_experts = config.experts_default
    config.experts = [spec.to_record() for spec in plan.specs]


def _warn_left_out(config: MoLoraConfig, files: list[ExpertFile]) -> None:
    for file in files:
        left_out = [name for name in file.modules if not check_target_module_exists(config, name)]
        if len(left_out) == len(file.modules):
            raise PeftMoeError(
                f"expert {file.spec.name!r}: target_modules leaves out every module it adapts, such as "
                f"{left_out[0]}; leave target_modules out to take all of them"
            )
        if left_out:
            warnings.warn(
                f"expert {file.spec.name!r} also adapts {len(left_out)} modules that target_modules leaves "
                f"out, such as {left_out[0]}; its output will differ from the adapter's own",
                stacklevel=2,
            )


def as_linear(weight_RX: Tensor) -> nn.Linear:
    """Return a module that holds a factor [R, I] or [R, O] as its weight."""
    # Made on "meta", so that no time goes into random numbers that the weight replaces at once.
    linear = nn.Linear(weight_RX.shape[1], weight_RX.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight_RX)
    return linear
