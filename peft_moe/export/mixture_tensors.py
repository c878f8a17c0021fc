"""A mixture as its own tensors, from a folder or a model in memory; the base is never needed.

Letters: I in, O out, R total rank, E experts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import PeftMoeError, near_matches
from ..experts.spec import ExpertSpec
from ..io.sources import CONFIG_FILE, WEIGHTS_FILE, find_source
from ..ops import RankMap
from ..routers import Router
from ..routing.controls import current_controls
from ..tuner.config.mixture import MoLoraConfig
from ..tuner.layers.layer_groups import layer_settings
from ..tuner.layers.linear import MoLoraLayer
from ..tuner.layers.shared_router import BLOCK_ROUTER, MODEL_ROUTER
from ..tuner.saving.expert_digests import Slab, slab_digest
from ..tuner.saving.load_checks import compare_digests

PREFIX = "base_model.model."
_FACTOR = re.compile(rf"{re.escape(PREFIX)}(.+)\.molora_A\.weight")


@dataclass
class Mixture:
    """One mixture's config and tensors, whose names are those of a saved file.

    Attributes:
        label: where it comes from, for messages and reports.
        config: its own.
        names: of all its tensors.
        read: gives one of them.
        folder: of a saved mixture; None in memory.
        model: a mixture in memory; None for a folder.
        adapter: its name there.
        specs: its experts.
        layers: for each adapted module, sorted, which rank belongs to which expert.
    """

    label: str
    config: MoLoraConfig
    names: frozenset[str]
    read: Callable[[str], Tensor]
    folder: Path | None = None
    model: PeftModel | None = None
    adapter: str = "default"
    specs: list[ExpertSpec] = field(init=False)
    layers: dict[str, RankMap] = field(init=False)

    def __post_init__(self) -> None:
        self.specs = self.config.specs()
        found = (_FACTOR.fullmatch(name) for name in self.names)
        modules = sorted(match[1] for match in found if match)
        if not modules:
            raise PeftMoeError(
                f"{self.label} holds no experts; copy the folder again, or save the mixture again"
            )
        self.layers = {name: self._ranks(name) for name in modules}
        self._verify()

    @property
    def base(self) -> str | None:
        """Folder or Hub id of the base, if the mixture knows it."""
        inner = self.model.get_base_model() if self.model is not None else None
        return self.config.base_model_name_or_path or getattr(inner, "name_or_path", None) or None

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """A [R, I] and B [R, O] of all experts in one module."""
        a, b = (self.read(f"{PREFIX}{module}.molora_{side}.weight") for side in "AB")
        return a, b

    def expert(self, module: str, index: int) -> tuple[Tensor, Tensor]:
        """A [r, I] and B [r, O] of one expert there, bit for bit."""
        segment = self.layers[module].slices()[index]
        A_RI, B_RO = self.factors(module)
        return A_RI[segment], B_RO[segment]

    def extras(self) -> dict[str, Tensor]:
        """What the mixture trained beside experts and routers: biases, whole modules, tokens."""
        return {name: self.read(name) for name in sorted(self.names) if "molora_" not in name}

    def gates(self, module: str) -> Tensor:
        """Constant gates [E] of one module, float32 or wider.

        Raises:
            PeftMoeError: the router's weights are not there.
        """
        if self.model is not None:
            layer: Any = self.model.get_base_model().get_submodule(module)
            gates_E: Tensor = layer.constant_gates(self.adapter).detach().cpu()
            return gates_E
        ranks = self.layers[module]
        width = self.factors(module)[0].shape[1]
        router = Router(layer_settings(self.config, self._present(ranks), None), width)
        prefix = self._router_prefix(module)
        stored = {n.removeprefix(prefix): self.read(n) for n in self.names if n.startswith(prefix)}
        try:
            router.load_state_dict(stored)
        except RuntimeError as error:
            raise PeftMoeError(
                f"{self.label}: the router of {module} cannot be read ({error}); copy the folder again"
            ) from error
        with torch.no_grad():
            return router.eval()(torch.zeros(1, 1, width)).gates.reshape(-1)

    def _router_prefix(self, module: str) -> str:
        seats = {
            "module": f"{module}.",
            "block": f"{module.rpartition('.')[0]}.{BLOCK_ROUTER}.",
            "model": f"{MODEL_ROUTER}.",
        }
        return f"{PREFIX}{seats[str(self.config.router_scope)]}molora_router."

    def _ranks(self, module: str) -> RankMap:
        ranks = tuple(spec.rank_in(module) for spec in self.specs)
        scaling = tuple(spec.scaling_in(module) for spec in self.specs)
        rows = len(self.factors(module)[0])
        if self.config.experts_per_layer is not None:
            # Which group of layers this is, only the base would say; its size tells how many experts it has.
            kept = next((n for n in range(len(ranks) + 1) if sum(ranks[:n]) == rows), len(ranks))
            ranks = tuple(rank if index < kept else 0 for index, rank in enumerate(ranks))
        if sum(ranks) != rows:
            raise PeftMoeError(
                f"{self.label}: {module} holds {rows} ranks, the config describes {sum(ranks)}; config and "
                "weights do not belong together: copy the folder again"
            )
        return RankMap(ranks, scaling)

    def _present(self, ranks: RankMap) -> int | None:
        if self.config.experts_per_layer is None:
            return None
        return sum(rank > 0 for rank in ranks.ranks)

    def _verify(self) -> None:
        for name in self.names:
            if not bool(torch.isfinite(self.read(name)).all()):
                raise PeftMoeError(
                    f"{self.label}: {name} holds NaN or infinity; copy or save the mixture again"
                )
        recorded = {spec.name: spec.digest for spec in self.specs}
        if self.folder is not None and self.config.verify_experts and any(recorded.values()):
            compare_digests(
                [slab_digest(self._slabs(e)) for e in range(len(self.specs))], self.adapter, recorded
            )

    def _slabs(self, expert: int) -> list[Slab]:
        slabs: list[Slab] = []
        for module, ranks in self.layers.items():
            if ranks.ranks[expert]:
                A_rI, B_rO = self.expert(module, expert)
                slabs += [(module, "A", A_rI), (module, "B", B_rO)]
        return slabs


def open_mixture(mixture: str | os.PathLike[str] | PeftModel, adapter: str | None = None) -> Mixture:
    """A mixture to export.

    Args:
        mixture: folder or Hub id of a saved one, or a model that carries one.
        adapter: which one of a model; None takes its active one.

    Raises:
        PeftMoeError: there is no mixture, or its files are damaged.
    """
    if isinstance(mixture, str | os.PathLike):
        return _from_folder(mixture)
    configs: Mapping[str, Any] = getattr(mixture, "peft_config", {})
    name = adapter or str(getattr(mixture, "active_adapter", "default"))
    config = configs.get(name)
    if not isinstance(mixture, PeftModel) or not isinstance(config, MoLoraConfig):
        held = [n for n, c in configs.items() if isinstance(c, MoLoraConfig)]
        raise PeftMoeError(
            f"adapter {name!r} of {type(mixture).__name__} is no mixture.{near_matches(name, held)} Give a "
            "PeftModel with an active mixture, or the folder of a saved one"
        )
    if current_controls() is not None:
        raise PeftMoeError(
            "what use_experts, use_gates or use_temperature set holds for a while and is not exported; leave "
            "the `with` block, and give `gates` for fixed ones"
        )
    for layer in mixture.modules():
        if isinstance(layer, MoLoraLayer) and name in layer.mixtures and layer.mixtures[name].pending_weights:
            layer._check_arrived(name)
    tensors = get_peft_model_state_dict(mixture, adapter_name=name, save_embedding_layers=False)
    tensors = {key: value.detach() for key, value in tensors.items()}
    label = f"the mixture {name!r} in memory"
    return Mixture(label, config, frozenset(tensors), tensors.__getitem__, model=mixture, adapter=name)


def _from_folder(mixture: str | os.PathLike[str]) -> Mixture:
    source = find_source("mixture", mixture)
    folder = Path(source.file(CONFIG_FILE)).parent
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, MoLoraConfig):
        raise PeftMoeError(
            f"{mixture} holds a {config.peft_type} adapter, no mixture; name a mixture's folder"
        )
    path = source.file(WEIGHTS_FILE)
    try:
        file: Any = safe_open(path, framework="pt", device="cpu").__enter__()  # type: ignore[no-untyped-call]  # untyped, safetensors'
        names = frozenset(file.keys())
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise PeftMoeError(
            f"{path} is no sound safetensors file: {error}; copy or download it again"
        ) from error
    return Mixture(str(mixture), config, names, file.get_tensor, folder=folder)
