"""The reference model of DPO, KTO and GRPO: the mixture at the start of training, or the base alone.

TRL itself has two kinds of reference. For a model made from ``peft_config`` it disables the adapters. The
reference is then the base, which equals the policy at step 0 for a fresh LoRA but not for a mixture. For a
PeftModel it adds a second adapter "ref", which copies the first one with all its experts and is saved beside
it. Here the start consists of the trained tensors alone. They replace the current ones for one pass, and
frozen experts are shared.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...errors import PeftMoeError, near_matches
from ...io.atomic import replace_file
from ...routers import Router
from ...routing.context import record_routing
from ...tuner.layers.shared_router import named_routers
from .checks import mixture_config

START, BASE = "start", "base"
KINDS = {START: "the mixture at the start of training", BASE: "the base without the mixture"}
FILE = "reference.safetensors"
"""The start, in each checkpoint: a resumed run begins with other weights than those of the start."""


class Reference(nn.Module):
    """A reference model without weights of a model: it runs the policy with other tensors, without gradients.

    Attributes:
        kind: "start" or "base".
        stored: the start's tensors by name; None before training, and for "base".

    Args:
        kind: see above.
        policy: returns the PeftModel, which need not exist yet.

    Raises:
        PeftMoeError: ``kind`` is unknown.
    """

    def __init__(self, kind: str, policy: Callable[[], PeftModel]) -> None:
        super().__init__()
        if kind not in KINDS:
            choices = "; ".join(f"{name!r} is {meaning}" for name, meaning in KINDS.items())
            raise PeftMoeError(f"reference={kind!r} is unknown: {choices}.{near_matches(kind, KINDS)}")
        self.kind, self._policy = kind, policy
        self.stored: dict[str, Tensor] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        # Trainers replace the forward method of a reference to fuse its LM head and to set its precision. The
        # policy's forward method has both already.
        if name != "forward":
            super().__setattr__(name, value)

    @property
    def config(self) -> Any:
        """The base's config, which trainers read from a reference."""
        return self._policy().config

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the policy's tensors and the kind, by which TRL's cache of log-probabilities is keyed."""
        kind = torch.tensor(list(KINDS).index(self.kind))
        return {**self._policy().state_dict(*args, **kwargs), "reference.kind": kind}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the policy as the reference. An enclosing recorder does not record this pass."""
        with torch.no_grad(), record_routing(), self._as_reference():
            return self._policy()(*args, **kwargs)

    def current(self) -> dict[str, Tensor]:
        """Return what training changes: trainable parameters, and the routers' buffers."""
        policy: nn.Module = self._policy()
        tensors: dict[str, Tensor] = {n: p for n, p in policy.named_parameters() if p.requires_grad}
        adapter, _ = mixture_config(policy)
        for name, router in named_routers(policy, adapter):
            tensors.update({f"{name}.{key}": buffer for key, buffer in router.named_buffers()})
        return tensors

    def store(self) -> None:
        """Store copies of the policy's current tensors as the start, unless a start is stored already."""
        if self.kind == START and self.stored is None:
            self.stored = {name: value.detach().clone() for name, value in self.current().items()}

    def differs(self) -> bool:
        """Return whether the policy's tensors differ from the stored start."""
        stored = self.stored or {}
        return any(not torch.equal(value, stored[n]) for n, value in self.current().items() if n in stored)

    def follow(self, share: float) -> None:
        """Move the start towards the policy (TR-DPO, arXiv 2404.09656).

        Args:
            share: weight of the policy's current tensors, 0 to 1.
        """
        for name, value in self._matching().items():
            start = (self.stored or {})[name]
            if start.is_floating_point():
                start.mul_(1 - share).add_(value.detach(), alpha=share)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the stored start into a checkpoint, atomically."""
        if self.stored is not None:
            tensors = {name: value.contiguous().cpu() for name, value in self.stored.items()}
            replace_file(Path(folder, FILE), lambda temporary: save_file(tensors, temporary))

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Read the start from a checkpoint.

        Raises:
            PeftMoeError: the checkpoint has no start, or the start of another mixture.
        """
        if self.kind != START:
            return
        path, current = Path(folder, FILE), self.current()
        if not path.is_file():
            raise PeftMoeError(
                f"{folder} holds no {FILE}: the run that wrote it had no reference='start'. Resume with the "
                "reference that it had, or start a new run from its mixture"
            )
        start = load_file(path)
        if {n: v.shape for n, v in start.items()} != {n: v.shape for n, v in current.items()}:
            raise PeftMoeError(
                f"{path} belongs to another mixture: it holds {len(start)} tensors, this mixture trains "
                f"{len(current)}; resume with the experts and the router of the run that wrote it"
            )
        self.stored = {name: value.to(current[name]) for name, value in start.items()}

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        policy = self._policy()
        routers = [m for m in policy.modules() if isinstance(m, Router) and m.training]
        for router in routers:
            router.eval()  # the reference uses no exploration noise
        try:
            with policy.disable_adapter() if self.kind == BASE else self._with_start():
                yield
        finally:
            for router in routers:
                router.train()

    @contextmanager
    def _with_start(self) -> Iterator[None]:
        # The data of parameters are exchanged in place, without copies. They are restored before any backward
        # pass, so that gradients belong to the policy.
        pairs = [(value, (self.stored or {})[name]) for name, value in self._matching().items()]
        policy_data = [value.data for value, _ in pairs]
        for value, start in pairs:
            value.data = start
        try:
            yield
        finally:
            for (value, _), data in zip(pairs, policy_data, strict=True):
                value.data = data

    def _matching(self) -> dict[str, Tensor]:
        """Return the policy's current tensors, checked against the stored start."""
        if self.stored is None:
            return {}  # training has not begun: the policy is the start
        current = self.current()
        if {n: v.shape for n, v in self.stored.items()} != {n: v.shape for n, v in current.items()}:
            raise PeftMoeError(
                "experts were added, removed or frozen since training began, so that there is no start "
                "to compare with; make a new trainer from this model, or take reference='base'"
            )
        return current
