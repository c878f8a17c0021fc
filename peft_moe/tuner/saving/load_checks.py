"""Checks that loaded experts and routers are those that the config describes.

Each load is checked once, after its end: in PEFT's last call of the load, or before the next forward pass.
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

_VERIFIER = "load_verifier"  # attribute of the model's shared router
# A factor to which PEFT has not added the adapter's name.
_WITHOUT_ADAPTER = re.compile(r"(?:^|\.)molora_[AB]\.weight$")


class LoadVerifier:
    """Watches the loads into the mixtures of one model, and checks each of them.

    Attributes:
        configs: config of every mixture, by adapter.
        unchecked: adapters with a load that is not checked yet, and the names of the tensors in it.
        snapshots: the model before the injection of an adapter whose weights are still to be loaded.
        handles: handles of the hooks that stay.
    """

    def __init__(self, model: nn.Module) -> None:
        self.configs: dict[str, MoLoraConfig] = {}
        self.unchecked: dict[str, set[str]] = {}
        self.snapshots: dict[str, Snapshot] = {}
        self.handles = [model.register_load_state_dict_pre_hook(self._at_load)]  # type: ignore[no-untyped-call]  # untyped, torch's
        # Forward passes have a hook only while a load is unchecked.
        self._forward_hook: Any = None

    def begin(self, model: nn.Module, adapter: str, names: set[str]) -> None:
        """Note the tensors of a load of ``adapter``, which is checked before the next forward pass."""
        self.unchecked.setdefault(adapter, set()).update(names)
        if self._forward_hook is None:
            self._forward_hook = model.register_forward_pre_hook(self._at_forward, prepend=True)

    def end(self, adapter: str) -> None:
        """Forget the load of ``adapter``, which is checked or replaced by another."""
        self.unchecked.pop(adapter, None)
        if not self.unchecked and self._forward_hook is not None:
            self._forward_hook.remove()
            self._forward_hook = None

    def _at_load(self, model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for complete, config in self.configs.items():
            if complete not in self.unchecked:
                check_incoming(model, complete, config, state_dict, prefix)
        names: dict[str, set[str]] = {}
        # PEFT adds the adapter's name to the tensors that the mixture has modules for, and to no others.
        extra = {key.removeprefix(prefix) for key in state_dict if _WITHOUT_ADAPTER.search(key)}
        for key in state_dict:
            adapter = adapter_of(key)
            if adapter in self.configs and "molora_router" not in key:
                names.setdefault(adapter, set(extra)).add(key.removeprefix(prefix))
        for adapter, keys in names.items():
            self.begin(model, adapter, keys)

    def _at_forward(self, model: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            used = {a for m in model.modules() if isinstance(m, MixtureLayer) for a in m.adapters_now()}
            for adapter in used & self.unchecked.keys():
                self.check(model, adapter)

    def check(self, model: nn.Module, adapter: str) -> None:
        """Check the load of an adapter, if it has an unchecked one whose tensors are there.

        Raises:
            PeftMoeError: see :func:`check_loaded`; or weights and config are not from one save.
        """
        config = self.configs.get(adapter)
        if config is None or adapter not in self.unchecked:
            return
        recorded = {record["name"]: record.get("digest") for record in config.records()}
        if check_loaded(model, adapter, self.unchecked[adapter], recorded, verify=config.verify_experts):
            if config.verify_experts:
                _compare_saved(model, adapter, config.weights_digest)
            # A later load under this name, such as a checkpoint of the same run, is another save.
            config.weights_digest = None
            self.end(adapter)
            self.snapshots.pop(adapter, None)


def record_expert_digests(
    model: nn.Module,
    model_router: SharedRouter,
    adapter: str,
    config: MoLoraConfig,
    plan: ExpertPlan,
    before: Snapshot,
) -> None:
    """Record the digests of the experts that an injection has read, or prepare the check of a load.

    Args:
        model: the base with its mixtures.
        model_router: the shared router of the model; the verifier's hooks are removed with it.
        adapter: the injected adapter.
        config: the adapter's config; the digests of frozen experts are written into its records.
        plan: where the adapter's experts come from.
        before: the model before the injection, to restore if the loaded weights are refused.
    """
    verifier: LoadVerifier | None = model_router.__dict__.get(_VERIFIER)
    if verifier is None:
        verifier = model_router.__dict__[_VERIFIER] = LoadVerifier(model)
        model_router.handles += verifier.handles
    verifier.configs[adapter] = config
    verifier.end(adapter)
    verifier.snapshots.clear()  # a snapshot for another adapter does not contain this one
    if plan.files and not config.experts_train:
        for record, digest in zip(config.records(), expert_digests(model, adapter), strict=True):
            record["digest"] = digest
    if plan.pending_weights:
        # Like pending experts, routers start as NaN, which no file may hold: what stays NaN was not loaded.
        with torch.no_grad():
            for _, router in named_routers(model, adapter):
                for tensor in router.state_dict().values():
                    if tensor.is_floating_point():
                        tensor.fill_(torch.nan)
        verifier.begin(model, adapter, set())
        verifier.snapshots[adapter] = before


def check_incoming(
    model: nn.Module, adapter: str, config: MoLoraConfig, state_dict: dict[str, Tensor], prefix: str
) -> None:
    """Check tensors that are about to replace those of a complete mixture, before they do.

    Args:
        model: the base with its mixtures.
        adapter: the mixture's adapter.
        config: the mixture's config.
        state_dict, prefix: the arguments that ``load_state_dict`` passes to hooks.

    Raises:
        PeftMoeError: a tensor is not finite, or an expert is not the one in the config.
    """
    incoming = {k.removeprefix(prefix): t for k, t in state_dict.items() if adapter_of(k) == adapter}
    for name, tensor in incoming.items():
        if not tensor.is_meta and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise PeftMoeError(
                f"adapter {adapter!r}: {name} of the loaded file holds NaN or infinity; the mixture is "
                "unchanged. Copy the folder again"
            )
    recorded = {record["name"]: record.get("digest") for record in config.records()}
    if incoming and config.verify_experts and any(recorded.values()):
        paths = {layer: path for path, layer in model.named_modules() if isinstance(layer, MixtureLayer)}

        def weight_of(layer: Any, side: str) -> Tensor | None:
            return incoming.get(f"{paths[layer]}.molora_{side}.{adapter}.weight")

        compare_digests(expert_digests(model, adapter, weight_of), adapter, recorded)


def check_load(model: nn.Module, adapter: str, configs: dict[str, Any]) -> None:
    """Check a load of ``adapter`` that has just ended; do nothing if there was none.

    A new adapter that is refused is removed: the model is then as it was before the injection.

    Args:
        model: the base with its mixtures.
        adapter: the loaded adapter.
        configs: PEFT's configs by adapter.

    Raises:
        PeftMoeError: see :meth:`LoadVerifier.check`.
    """
    model_router: SharedRouter | None = getattr(model, MODEL_ROUTER, None)
    verifier: LoadVerifier | None = getattr(model_router, "__dict__", {}).get(_VERIFIER)
    if verifier is None:
        return
    try:
        verifier.check(model, adapter)
    except PeftMoeError:
        if adapter in verifier.snapshots:
            verifier.snapshots.pop(adapter).restore()
            configs.pop(adapter, None)
        raise


def check_loaded(
    model: nn.Module, adapter: str, keys: set[str], recorded: dict[str, str | None], *, verify: bool
) -> bool:
    """Check the weights that a load has brought.

    Args:
        model: the base with its mixtures.
        adapter: the loaded adapter.
        keys: names of the loaded tensors, as in the state dict of ``model``.
        recorded: digest of every expert in the config, by name; None where the config has none.
        verify: whether digests are compared.

    Returns:
        False if nothing has been loaded yet.

    Raises:
        PeftMoeError: a tensor is missing, not finite or not part of the mixture, or an expert is not the one
            that the config describes.
    """
    layers = mixture_layers(model, adapter)
    # Planning traces a mixture of fake tensors, which have no values to check.
    if any(isinstance(layer.molora_A[adapter].weight, FakeTensor) for layer in layers.values()):
        return False
    # Every loader overwrites whole tensors; until then a tensor is empty or NaN.
    if all(_is_missing(read(layer.molora_A[adapter])) for layer in layers.values()):
        return False
    extra = sorted(keys - model.state_dict().keys())
    if extra:
        raise PeftMoeError(
            f"adapter {adapter!r}: the file holds {len(extra)} tensors which this mixture has no place for, "
            f"for example {extra[0]}; it was saved on another base, or config and weights do not belong "
            "together: load it on the base that it was made on, or copy the folder again"
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


def compare_digests(digests: list[str | None], adapter: str, recorded: dict[str, str | None]) -> None:
    """Compare experts with the digests in a config.

    Args:
        digests: digest of every expert, in the mixture's order.
        adapter: adapter to name in the message.
        recorded: digest of every expert in the config, by name; None where the config has none.

    Raises:
        PeftMoeError: the digests of an expert differ.
    """
    for (expert, expected), actual in zip(recorded.items(), digests, strict=True):
        # Experts that the user has cast have another dtype, and their bytes cannot be compared.
        comparable = expected and actual and expected.split(":")[0] == actual.split(":")[0]
        if comparable and expected != actual:
            raise PeftMoeError(
                f"adapter {adapter!r}: the weights of expert {expert!r} are not those that its config "
                f"describes (SHA-256 {short(actual)}, recorded {short(expected)}): the file is damaged, or "
                "belongs to another mixture. Copy the folder again; to load another mixture, choose another "
                "adapter_name or delete this one first; if the change is intended, set verify_experts=False"
            )


def _compare_saved(model: nn.Module, adapter: str, expected: str | None) -> None:
    if not expected:
        return
    part = expected.split(" ", 1)[0]
    actual = tensors_digest(part, saved_tensors(model, adapter, part))
    # As with experts: weights that the user has cast cannot be compared.
    if actual and actual.split(":")[0] == expected.split(":")[0] and actual != expected:
        parts = "routers" if part == "routers" else "routers or experts"
        raise PeftMoeError(
            f"adapter {adapter!r}: the weights of its {parts} are not those that were saved with its config "
            f"(SHA-256 {short(actual)}, recorded {short(expected)}): the file is damaged, or config and "
            "weights are not from one save. Copy the folder again; if the change is intended, set "
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
