"""What a form of the mixture is, and the list of them.

A form is one way to compute the same thing. It says which calls it can serve and what one would cost;
``cost.choose`` takes the cheapest. A new form (a kernel for a device) is one file that registers itself.

Letters: N tokens, I in, O out, R total rank, E experts, K chosen experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from .rank_map import RankMap

if TYPE_CHECKING:
    from .device_costs import Constants

# The cost of a backend that serves a call only when it is asked for by name.
NEVER_CHEAPEST = math.inf
# The reason of backends that multiply the chosen experts only.
NO_TOP_K = "its router keeps no fixed number of experts per token (top_k)"


class MixInputs(NamedTuple):
    """The tensors of one call; see :func:`peft_moe.ops.mix`."""

    x: Tensor  # [N, I]
    A: Tensor  # [R, I]
    B: Tensor  # [R, O]
    gates: Tensor  # [N, E] or [1, E]; where the chosen experts are given, their weights
    ranks: RankMap
    base: Tensor  # [N, O]
    ids: Tensor | None  # [N, K] or [1, K]
    weights: Tensor | None  # as ids
    may_select_null: bool = True  # whether "no expert" may be among the ids
    overwrite: bool = False  # whether the sum may take the place of ``base``
    wide: Tensor | None = None  # x in float32, where it is at hand

    def dense(self) -> Tensor:
        """Gates of all experts, [N, E] or [1, E]."""
        if self.ids is None:
            return self.gates
        experts = len(self.ranks.ranks)
        room = self.gates.new_zeros(len(self.gates), experts + 1)
        return room.scatter(1, self.ids, self.gates)[:, :experts]

    def choice_per_token(self) -> tuple[Tensor, Tensor]:
        """Return the chosen experts and their weights, a row for each token: two of [N, K]."""
        assert self.ids is not None, "only a call with chosen experts has a choice"
        assert self.weights is not None
        return self.ids.expand(len(self.x), -1), self.weights.expand(len(self.x), -1)


@dataclass(frozen=True)
class CallSpec:
    """What is known of a call without looking at its numbers.

    Attributes:
        tokens, in_features, out_features: N, I, O.
        ranks: the segments of R.
        chosen: K, where every token keeps K experts whose numbers are given; None for dense gates.
        one_row: one row of gates serves all tokens.
        dtype: of the products.
        device: "cpu", "cuda", ….
        trains: which gradients are wanted: "x", "experts", "gates"; empty without autograd.
        compiling: whether torch.compile traces the call.
    """

    tokens: int
    in_features: int
    out_features: int
    ranks: RankMap
    chosen: int | None
    one_row: bool
    dtype: torch.dtype
    device: str
    trains: frozenset[str]
    compiling: bool

    @property
    def sizes(self) -> int:
        """I + O: what the work on one rank is proportional to."""
        return self.in_features + self.out_features


class Backend(Protocol):
    """One way to compute a mixture."""

    name: str

    def supports(self, spec: CallSpec) -> str | None:
        """None if it can serve such a call, else the reason why not, for the user to read."""

    def cost(self, spec: CallSpec, constants: Constants) -> float:
        """Predicted seconds that the mixture adds to the base layer and the router."""

    def mix(self, inputs: MixInputs) -> Tensor:
        """The base's output plus the mixture's, [N, O], in the dtype of ``base_NO``."""


BACKENDS: dict[str, Backend] = {}


def register_backend(backend: Backend) -> None:
    """Offer a form under its name; of two that cost the same, the one registered first is taken."""
    assert backend.name not in BACKENDS, backend.name
    BACKENDS[backend.name] = backend


def product_dtype(x_NI: Tensor, A_RI: Tensor) -> torch.dtype:
    """The dtype of the products: the wider one of input and experts, as in PEFT, or autocast's."""
    same = x_NI.dtype == A_RI.dtype
    wide = x_NI.dtype if same else torch.promote_types(x_NI.dtype, A_RI.dtype)
    device = x_NI.device.type
    if wide != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return wide


def add_product(
    base_NO: Tensor, hg_NR: Tensor, B_RO: Tensor, overwrite: bool, scaling: float = 1.0
) -> Tensor:
    """``base + scaling · hg B``: summed once, in the dtype of the base, and in its place if allowed."""
    own, wide = base_NO.dtype, hg_NR.dtype
    if own == wide:
        into = base_NO.addmm_ if overwrite else base_NO.addmm
        return into(hg_NR, B_RO, alpha=scaling)
    if torch.promote_types(own, wide) != wide:
        return add(base_NO, hg_NR @ B_RO, overwrite, scaling)
    sum_NO = base_NO.to(wide).addmm_(hg_NR, B_RO, alpha=scaling)  # in the copy: one [N, O] less
    return base_NO.copy_(sum_NO) if overwrite else sum_NO.to(own)


def add(base_NO: Tensor, delta_NO: Tensor, overwrite: bool, scaling: float = 1.0) -> Tensor:
    """``base + scaling · delta``, in the same way."""
    if overwrite:
        return base_NO.add_(delta_NO, alpha=scaling)
    return base_NO.add(delta_NO, alpha=scaling).to(base_NO.dtype)
