"""The map from ranks to experts: the index of the stacked A and B factors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class RankMap:
    """Segments of the rank axis of one layer.

    Attributes:
        ranks: r_e of every expert, in the mixture's order; 0 for an expert that does not adapt this layer.
        scaling: the factor of each expert's B·A, α/r or α/√r.
        total: R, the number of ranks of the layer.
        width: W, the largest r_e.
        equal: whether all r_e are equal, so that the rank axis is an [E, W] grid.
        one_scaling: the scaling that all experts share, or None where they differ.
        choices: the layer's cache of chosen backends, by kind of call; :func:`peft_moe.ops.mix` fills it.
    """

    ranks: tuple[int, ...]
    scaling: tuple[float, ...]
    total: int = field(init=False, repr=False, compare=False)
    width: int = field(init=False, repr=False, compare=False)
    equal: bool = field(init=False, repr=False, compare=False)
    one_scaling: float | None = field(init=False, repr=False, compare=False)
    choices: dict[Any, Any] = field(init=False, default_factory=dict, repr=False, compare=False)
    # Index tensors are made once per device. They are no buffers of a module, so that casting a model to
    # bf16 cannot round the scaling.
    _on_device: dict[Any, Tensor] = field(init=False, default_factory=dict, repr=False, compare=False)
    # The greatest common divisor of the ranks; expand() repeats gates by this many ranks at once.
    _step: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert len(self.ranks) == len(self.scaling) > 0, (self.ranks, self.scaling)
        self.total = sum(self.ranks)
        self.width = max(self.ranks)
        self.equal = len(set(self.ranks)) == 1
        self.one_scaling = float(self.scaling[0]) if len(set(self.scaling)) == 1 else None
        self._step = math.gcd(*self.ranks) or 1

    def slices(self) -> list[slice]:
        """Return each expert's segment of the rank axis."""
        ends = [sum(self.ranks[: index + 1]) for index in range(len(self.ranks))]
        return [slice(end - rank, end) for end, rank in zip(ends, self.ranks, strict=True)]

    def expand(self, gates: Tensor) -> Tensor:
        """Expand gates per expert to scaled gates per rank.

        Args:
            gates: [..., E], any float dtype.

        Returns:
            [..., R] in the same dtype, with ``gates[e] * scaling[e]`` at every rank of expert e.
        """
        if self.one_scaling is None:
            gates = gates * self._scaling(gates)
        elif self.one_scaling != 1.0:
            gates = gates * self.one_scaling
        if not self.equal:
            gates = gates.index_select(-1, self._step_owners(gates.device))
        # On a CPU, repeat_interleave is several times faster than a gather of columns.
        step = self.width if self.equal else self._step
        return gates if step == 1 else gates.repeat_interleave(step, dim=-1)

    def reduce(self, values: Tensor) -> Tensor:
        """Sum over each expert's ranks and scale, [..., R] to [..., E]; the transpose of :meth:`expand`."""
        if self.equal:
            sums = values.view(*values.shape[:-1], -1, self.width).sum(-1)
        else:
            sums = values.new_zeros(*values.shape[:-1], len(self.ranks))
            sums = sums.index_add(-1, self.owners(values.device), values)
        return sums * (self._scaling(sums) if self.one_scaling is None else self.one_scaling)

    def scale_chosen(self, weights: Tensor, ids: Tensor) -> Tensor:
        """Multiply weights of chosen experts by their scaling; in the shape of ``ids``, E is "no expert"."""
        if self.one_scaling is not None:
            return weights if self.one_scaling == 1.0 else weights * self.one_scaling
        padded = self._cached(
            ("padded", weights.device, weights.dtype), lambda: _float64((*self.scaling, 0.0)).to(weights)
        )
        return weights * padded[ids]

    def owners(self, device: torch.device) -> Tensor:
        """Return the expert of every rank, long [R]."""
        return self._cached(("owners", device), lambda: torch.tensor(self._count(1), device=device).long())

    def rows(self, device: torch.device) -> Tensor:
        """Return the ranks of every expert and, last, of "no expert", long [E + 1, W], padded with R."""
        return self._cached(("rows", device), lambda: torch.tensor(self._table(), device=device).long())

    def numbers(self, device: torch.device) -> Tensor:
        """Return 0 … E - 1, long [E]."""
        return self._cached(("numbers", device), lambda: torch.arange(len(self.ranks), device=device))

    def _step_owners(self, device: torch.device) -> Tensor:
        return self._cached(
            ("steps", device), lambda: torch.tensor(self._count(self._step), device=device).long()
        )

    def _scaling(self, like: Tensor) -> Tensor:
        return self._cached((like.device, like.dtype), lambda: _float64(self.scaling).to(like))

    def _count(self, step: int) -> list[int]:
        return [e for e, rank in enumerate(self.ranks) for _ in range(rank // step)]

    def _table(self) -> list[list[int]]:
        starts = [segment.start for segment in self.slices()]
        return [
            [start + i if i < rank else self.total for i in range(self.width)]
            for start, rank in zip([*starts, 0], [*self.ranks, 0], strict=True)
        ]

    def _cached(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        tensor = self._on_device.get(key)
        if tensor is None:
            # Training cannot use a tensor that was made under torch.inference_mode().
            with torch.inference_mode(False):
                tensor = make()
            if type(tensor) is Tensor:  # a tracer's stand-in must not outlive the trace
                self._on_device[key] = tensor
        return tensor


def _float64(numbers: tuple[float, ...]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)
