"""Which rank belongs to which expert: the index of the stacked A and B."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class RankMap:
    """Segments of the rank axis of one layer.

    Attributes:
        ranks: r_e of every expert, in the mixture's order; 0 for one that does not adapt this layer.
        scaling: what expert e's B·A is multiplied by (α/r or α/√r), per expert.
    """

    ranks: tuple[int, ...]
    scaling: tuple[float, ...]
    # Index tensors are made once per device and kept out of the module's buffers, so that casting a
    # model to bf16 cannot round the scaling.
    _on_device: dict[torch.device, tuple[Tensor, Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        assert len(self.ranks) == len(self.scaling) > 0, (self.ranks, self.scaling)

    @property
    def total(self) -> int:
        """R, the number of ranks of the layer."""
        return sum(self.ranks)

    def slices(self) -> list[slice]:
        """Where each expert sits on the rank axis."""
        ends = [sum(self.ranks[: index + 1]) for index in range(len(self.ranks))]
        return [slice(end - rank, end) for end, rank in zip(ends, self.ranks, strict=True)]

    def expand(self, gates: Tensor) -> Tensor:
        """Gates per expert to scaled gates per rank.

        Args:
            gates: [..., E], any float dtype.

        Returns:
            [..., R], the same dtype: ``gates[e] * scaling[e]`` at every rank of expert e.
        """
        expert_of_rank_R, scaling_E = self._tensors(gates.device)
        scaled = gates * scaling_E.to(gates.dtype)
        if len(set(self.ranks)) == 1:
            # On CPU repeat_interleave is several times faster than a gather of columns.
            return scaled.repeat_interleave(self.ranks[0], dim=-1)
        return scaled.index_select(-1, expert_of_rank_R)

    def _tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._on_device:
            owners = [e for e, rank in enumerate(self.ranks) for _ in range(rank)]
            # Made under torch.inference_mode() they could never be used in training afterwards.
            with torch.inference_mode(False):
                self._on_device[device] = (
                    torch.tensor(owners, dtype=torch.long, device=device),
                    torch.tensor(self.scaling, dtype=torch.float64, device=device),
                )
        return self._on_device[device]
