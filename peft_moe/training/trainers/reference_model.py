"""What a trained policy is measured against: the mixture as training began, or the base without it.

TRL's own ways are two. A model made from ``peft_config`` has its adapters disabled: the bare base, which
for a fresh LoRA is the policy at step 0, and for a mixture is not. A PeftModel gets a second adapter "ref",
a copy of the first with all its experts, saved beside it. Here the start is kept as the trained numbers
alone, put in place of the current ones for one pass; experts that stay still are shared.
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
KINDS = {START: "the mixture as training began", BASE: "the base without the mixture"}
FILE = "reference.safetensors"
"""In each checkpoint: a run that goes on has other numbers than the one that began."""


class Reference(nn.Module):
    """A reference model that holds no model: it runs the policy under other numbers, without gradients.

    Args:
        kind: "start" or "base".
        policy: finds the PeftModel; it may exist only later.

    Raises:
        PeftMoeError: another ``kind``.
    """

    def __init__(self, kind: str, policy: Callable[[], PeftModel]) -> None:
        super().__init__()
        if kind not in KINDS:
            meant = "; ".join(f"{name!r} is {what}" for name, what in KINDS.items())
            raise PeftMoeError(f"reference={kind!r} is unknown: {meant}.{near_matches(kind, KINDS)}")
        self.kind, self._policy = kind, policy
        self.held: dict[str, Tensor] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        # Trainers put a fused head, and precision, around every reference; the policy has both already.
        if name != "forward":
            super().__setattr__(name, value)

    @property
    def config(self) -> Any:
        """The base's config, which trainers ask of a reference."""
        return self._policy().config

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """What tells this reference from others: the policy's tensors, and the kind."""
        kind = torch.tensor(list(KINDS).index(self.kind))
        return {**self._policy().state_dict(*args, **kwargs), "reference.kind": kind}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The policy's own pass; a recorder around it does not hear of it."""
        with torch.no_grad(), record_routing(), self._in_place():
            return self._policy()(*args, **kwargs)

    def current(self) -> dict[str, Tensor]:
        """What training moves: trainable parameters, and the routers' buffers."""
        policy: nn.Module = self._policy()
        found: dict[str, Tensor] = {n: p for n, p in policy.named_parameters() if p.requires_grad}
        adapter, _ = mixture_config(policy)
        for name, router in named_routers(policy, adapter):
            found.update({f"{name}.{key}": buffer for key, buffer in router.named_buffers()})
        return found

    def hold(self) -> None:
        """Take the policy's numbers of now for the start, unless there is one already."""
        if self.kind == START and self.held is None:
            self.held = {name: value.detach().clone() for name, value in self.current().items()}

    def moved(self) -> bool:
        """Whether the policy has other numbers than the start that is held."""
        held = self.held or {}
        return any(not torch.equal(value, held[n]) for n, value in self.current().items() if n in held)

    def follow(self, share: float) -> None:
        """Move the start towards the policy (TR-DPO, arXiv 2404.09656): ``share`` of it is new."""
        for name, value in self._matching().items():
            held = (self.held or {})[name]
            if held.is_floating_point():
                held.mul_(1 - share).add_(value.detach(), alpha=share)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write what is held into a checkpoint: beside its place, then renamed."""
        if self.held is not None:
            held = {name: value.contiguous().cpu() for name, value in self.held.items()}
            replace_file(Path(folder, FILE), lambda beside: save_file(held, beside))

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Take the start from a checkpoint.

        Raises:
            PeftMoeError: it has none, or that of another mixture.
        """
        if self.kind != START:
            return
        place, found = Path(folder, FILE), self.current()
        if not place.is_file():
            raise PeftMoeError(
                f"{folder} holds no {FILE}: the run that wrote it had no reference='start'. Resume with the "
                "reference that it had, or start anew from its mixture"
            )
        held = load_file(place)
        if {n: v.shape for n, v in held.items()} != {n: v.shape for n, v in found.items()}:
            raise PeftMoeError(
                f"{place} is of another mixture: it holds {len(held)} tensors, this mixture trains "
                f"{len(found)}; resume with the experts and the router of the run that wrote it"
            )
        self.held = {name: value.to(found[name]) for name, value in held.items()}

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        policy = self._policy()
        routers = [m for m in policy.modules() if isinstance(m, Router) and m.training]
        for router in routers:
            router.eval()  # noise that is drawn to explore is no part of a reference
        try:
            with policy.disable_adapter() if self.kind == BASE else self._started():
                yield
        finally:
            for router in routers:
                router.train()

    @contextmanager
    def _started(self) -> Iterator[None]:
        # Storages are exchanged and come back before any backward pass, which then finds its own.
        pairs = [(value, (self.held or {})[name]) for name, value in self._matching().items()]
        now = [value.data for value, _ in pairs]
        for value, held in pairs:
            value.data = held
        try:
            yield
        finally:
            for (value, _), data in zip(pairs, now, strict=True):
                value.data = data

    def _matching(self) -> dict[str, Tensor]:
        if self.held is None:
            return {}  # training has not begun: the policy is the start
        found = self.current()
        if {n: v.shape for n, v in self.held.items()} != {n: v.shape for n, v in found.items()}:
            raise PeftMoeError(
                "experts came, went or were frozen since training began, so that there is no start "
                "to compare with; make a new trainer from this model, or take reference='base'"
            )
        return found
