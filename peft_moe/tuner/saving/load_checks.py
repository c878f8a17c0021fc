"""Whether the experts and routers that were loaded are those that the config describes.

Checked once for every load, when it has ended: by PEFT's last call of it, or before the next forward pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ...errors import PeftMoeError
from ...io.digests import tensors_digest
from ...io.offload import read, read_state
from ..layers.expert_factors import ExpertPlan
from ..layers.shared_router import MODEL_ROUTER, MixtureLayer, SharedRouter, named_routers
from .expert_digests import adapter_of, expert_digests, mixture_layers, saved_tensors, short
from .snapshot import Snapshot

if TYPE_CHECKING:
    from ..config.mixture import MoLoraConfig

_PLACELESS = re.compile(r"(?:^|\.)molora_[AB]\.weight$")


class LoadVerifier:
    """Watches what is loaded into the mixtures of one model."""

    def __init__(self, model: nn.Module) -> None:
        self.configs: dict[str, MoLoraConfig] = {}
        # Adapters with a load that is not checked yet, and the names of the tensors that it held.
        self.open: dict[str, set[str]] = {}
        # The model before the injection of an adapter that is to be loaded.
        self.before: dict[str, Snapshot] = {}
        self.handles = [model.register_load_state_dict_pre_hook(self._at_load)]
        # The hook of forward passes, while a load is open.
        self.watching: Any = None

    def begin(self, model: nn.Module, adapter: str, names: set[str]) -> None:
        """Note the tensors of a load of ``adapter``; it is checked before the next forward pass."""
        self.open.setdefault(adapter, set()).update(names)
        if self.watching is None:
            self.watching = model.register_forward_pre_hook(self._at_forward, prepend=True)

    def end(self, adapter: str) -> None:
        """Forget the load of ``adapter``."""
        self.open.pop(adapter, None)
        if not self.open and self.watching is not None:
            self.watching.remove()
            self.watching = None

    def _at_load(self, model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for known, config in self.configs.items():
            if known not in self.open:
                check_before(model, known, config, state_dict, prefix)
        names: dict[str, set[str]] = {}
        # PEFT gives the adapter's name to all tensors that the mixture has a place for.
        extra = {key.removeprefix(prefix) for key in state_dict if _PLACELESS.search(key)}
        for key in state_dict:
            adapter = adapter_of(key)
            if adapter in self.configs and "molora_router" not in key:
                names.setdefault(adapter, set(extra)).add(key.removeprefix(prefix))
        for adapter, keys in names.items():
            self.begin(model, adapter, keys)

    def _at_forward(self, model: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            used = {a for m in model.modules() if isinstance(m, MixtureLayer) for a in m.adapters_now()}
            for adapter in used & self.open.keys():
                self.check(model, adapter)

    def check(self, model: nn.Module, adapter: str) -> None:
        """Check the load of an adapter that is still open, if there is one and it has begun."""
        config = self.configs.get(adapter)
        if config is None or adapter not in self.open:
            return
        recorded = {record["name"]: record.get("digest") for record in config.records()}
        if check_arrived(model, adapter, self.open[adapter], recorded, verify=config.verify_experts):
            if config.verify_experts:
                _compare_saved(model, adapter, config.weights_digest)
            # What comes later under this name, such as a checkpoint of the same run, is another save.
            config.weights_digest = None
            self.end(adapter)
            self.before.pop(adapter, None)


def record_expert_digests(
    model: nn.Module,
    seat: SharedRouter,
    adapter: str,
    config: MoLoraConfig,
    plan: ExpertPlan,
    before: Snapshot,
) -> None:
    """After an injection: record what was read, or get ready to check what will be loaded.

    Args:
        model: the base with its mixtures.
        seat: the model's, whose hooks are taken out with it.
        adapter: what was injected.
        config: its own; the digests of frozen experts are written into its records.
        plan: where its experts come from.
        before: the model as it was, to go back to if what is loaded is refused.
    """
    arrivals: LoadVerifier | None = seat.__dict__.get("arrivals")
    if arrivals is None:
        arrivals = seat.__dict__["arrivals"] = LoadVerifier(model)
        seat.handles += arrivals.handles
    arrivals.configs[adapter] = config
    arrivals.end(adapter)
    arrivals.before.clear()  # what was kept for another adapter knows nothing of this one
    if plan.files and not config.experts_train:
        for record, digest in zip(config.records(), expert_digests(model, adapter), strict=True):
            record["digest"] = digest
    if plan.pending_weights:
        # As the experts do, routers start as what no file holds.
        with torch.no_grad():
            for _, router in named_routers(model, adapter):
                for tensor in router.state_dict().values():
                    if tensor.is_floating_point():
                        tensor.fill_(torch.nan)
        arrivals.begin(model, adapter, set())
        arrivals.before[adapter] = before


def check_before(
    model: nn.Module, adapter: str, config: MoLoraConfig, state_dict: dict[str, Tensor], prefix: str
) -> None:
    """Check what is about to be loaded over a mixture that is whole, while it still is.

    Args:
        model: the base with its mixtures.
        adapter: the mixture's.
        config: its own.
        state_dict, prefix: as ``load_state_dict`` hands them to hooks.

    Raises:
        PeftMoeError: a tensor that is not finite, or an expert that is not the one in the config.
    """
    coming = {k.removeprefix(prefix): t for k, t in state_dict.items() if adapter_of(k) == adapter}
    for name, tensor in coming.items():
        if not tensor.is_meta and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise PeftMoeError(
                f"adapter {adapter!r}: {name} holds NaN or infinity in what is to be loaded; the mixture "
                "is as it was. Copy the folder again"
            )
    recorded = {record["name"]: record.get("digest") for record in config.records()}
    if coming and config.verify_experts and any(recorded.values()):
        paths = {layer: path for path, layer in model.named_modules() if isinstance(layer, MixtureLayer)}

        def weight_of(layer: Any, side: str) -> Tensor | None:
            return coming.get(f"{paths[layer]}.molora_{side}.{adapter}.weight")

        compare_digests(expert_digests(model, adapter, weight_of), adapter, recorded)


def check_load(model: nn.Module, adapter: str, configs: dict[str, Any]) -> None:
    """Check a load of ``adapter`` that has just ended; nothing to do if there was none.

    A new adapter that is refused is taken out again: the model is then as it was before its injection.

    Args:
        model: the base with its mixtures.
        adapter: what was loaded.
        configs: PEFT's, by adapter.
    """
    arrivals: LoadVerifier | None = getattr(getattr(model, MODEL_ROUTER, None), "__dict__", {}).get(
        "arrivals"
    )
    if arrivals is None:
        return
    try:
        arrivals.check(model, adapter)
    except PeftMoeError:
        if adapter in arrivals.before:
            arrivals.before.pop(adapter).restore()
            configs.pop(adapter, None)
        raise


def check_arrived(
    model: nn.Module, adapter: str, keys: set[str], recorded: dict[str, str | None], *, verify: bool
) -> bool:
    """Check what a load has brought.

    Args:
        model: the base with its mixtures.
        adapter: whose weights were loaded.
        keys: names of its tensors in what was loaded, as in the state dict of ``model``.
        recorded: digest of every expert, as in the config; None where there is none.
        verify: whether digests are compared.

    Returns:
        False if nothing has been loaded yet.

    Raises:
        PeftMoeError: a tensor is lost, not finite or not the mixture's, or an expert is not the one that the
            config describes.
    """
    layers = mixture_layers(model, adapter)
    # A plan traces a mixture without any bytes.
    if any(isinstance(layer.molora_A[adapter].weight, FakeTensor) for layer in layers.values()):
        return False
    # The loader overwrites all of a tensor, on whatever path; until then it is empty or NaN.
    if all(_is_missing(read(layer.molora_A[adapter])) for layer in layers.values()):
        return False
    extra = sorted(keys - model.state_dict().keys())
    if extra:
        raise PeftMoeError(
            f"adapter {adapter!r}: the file holds {len(extra)} tensors that this mixture has no place for, "
            f"such as {extra[0]}; the base is another one than it was saved on, or config and weights do not "
            "belong together: load it on its own base, or copy the folder again"
        )
    for name, tensor in _tensors(model, layers, adapter):
        if tensor.is_meta or not bool(torch.isfinite(tensor).all()):
            raise PeftMoeError(
                f"adapter {adapter!r}: {name} is missing from the file, or holds NaN or infinity in it; copy "
                "the folder again, or save the mixture again"
            )
    if verify and any(recorded.values()):
        compare_digests(expert_digests(model, adapter), adapter, recorded)
    for layer in layers.values():
        layer.mixtures[adapter].pending_weights = False
    return True


def compare_digests(found: list[str | None], adapter: str, recorded: dict[str, str | None]) -> None:
    """Hold experts against what a config records of them.

    Args:
        found: digest of every expert, in the mixture's order.
        adapter: for the message.
        recorded: the same in the config, by name; None where there is none.

    Raises:
        PeftMoeError: an expert is another one.
    """
    for (expert, wanted), here in zip(recorded.items(), found, strict=True):
        # Experts that were cast on purpose have other dtypes, and no bytes to compare.
        comparable = wanted and here and wanted.split(":")[0] == here.split(":")[0]
        if comparable and wanted != here:
            raise PeftMoeError(
                f"adapter {adapter!r}: the weights of expert {expert!r} are not those that its config "
                f"describes (SHA-256 {short(here)}, recorded {short(wanted)}): the file is damaged, or is "
                "that of another mixture. Copy the folder again; to load another mixture, choose another "
                "adapter_name or delete this one first; if the change is meant, set verify_experts=False"
            )


def _compare_saved(model: nn.Module, adapter: str, wanted: str | None) -> None:
    if not wanted:
        return
    part = wanted.split(" ", 1)[0]
    here = tensors_digest(part, saved_tensors(model, adapter, part))
    # As with experts: what was cast on purpose cannot be compared.
    if here and here.split(":")[0] == wanted.split(":")[0] and here != wanted:
        what = "routers" if part == "routers" else "routers or experts"
        raise PeftMoeError(
            f"adapter {adapter!r}: the weights of its {what} are not those that were saved with its config "
            f"(SHA-256 {short(here)}, recorded {short(wanted)}): the file is damaged, or config and "
            "weights are not of one save. Copy the folder again; if the change is meant, set "
            "verify_experts=False"
        )


def _is_missing(weight: Tensor) -> bool:
    return weight.is_meta or bool(torch.isnan(weight.flatten()[:1]).any())


def _tensors(model: nn.Module, layers: dict[str, Any], adapter: str) -> Iterator[tuple[str, Tensor]]:
    for name, layer in layers.items():
        yield f"{name}.molora_A", read(layer.molora_A[adapter])
        yield f"{name}.molora_B", read(layer.molora_B[adapter])
    for name, router in named_routers(model, adapter):
        for part, tensor in read_state(router).items():
            if tensor.is_floating_point():
                yield f"{name}.molora_router.{part}", tensor
