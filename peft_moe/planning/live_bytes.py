"""Counting the bytes that live while a model runs, without allocating any of them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# Allocators hand out multiples of this; torch's CUDA allocator uses 512.
GRAIN = 512


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped, torch's
    """While entered, follows every new tensor from the operation that makes it until nobody holds it.

    Attributes:
        now: bytes alive.
        peak: the most that were alive at once.
    """

    def __init__(self, known: Iterator[Tensor]) -> None:
        """``known`` are tensors that were there before, and are not counted."""
        super().__init__()  # type: ignore[no-untyped-call]  # untyped, torch's
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        for tensor in known:
            self._watch(tensor, 0)

    def _watch(self, tensor: Tensor, size: int | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return  # a view of what is alive already
        size = -(-storage.nbytes() // GRAIN) * GRAIN if size is None else size
        self._sizes[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._watch(value)
        return out


@contextmanager
def fake_weights(model: nn.Module) -> Iterator[LiveBytes]:
    """Run ``model``, whose weights have no memory ("meta"), as if it stood on a CPU; nothing is computed.

    Its weights are replaced for good. The tracker that is yielded does not count them, and counts nothing
    until it is entered.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        made: dict[int, tuple[Tensor, Tensor]] = {}
        for module in model.modules():
            slots: Any
            for slots in (module._parameters, module._buffers):
                for name, old in list(slots.items()):
                    if old is None:
                        continue
                    if id(old) not in made:
                        new: Tensor = torch.empty(old.shape, dtype=old.dtype)
                        if isinstance(old, nn.Parameter):
                            new = nn.Parameter(new, requires_grad=old.requires_grad)
                        made[id(old)] = (new, old)  # the old one is kept, so that its id stays its own
                    slots[name] = made[id(old)][0]
        yield LiveBytes(iter([new for new, _ in made.values()]))
