"""The protocol of a backend, its inputs, and the registry.

A backend is one way to compute the mixture. It says which calls it can serve and what a call would cost;
:func:`peft_moe.ops.choose` takes the cheapest. A new backend, for example a kernel for a device, is one file
with a class; ``peft_moe/ops/__init__.py`` registers it.

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

# The cost of a backend that serves a call only when its name is asked for.
NEVER_CHEAPEST = math.inf
# The reason for a refusal by backends that multiply only the chosen experts.
NO_TOP_K = "its router keeps no fixed number of experts per token (top_k)"


class MixInputs(NamedTuple):
    """The tensors of one call; see :func:`peft_moe.ops.mix`."""

    x: Tensor  # [N, I]
    A: Tensor  # [R, I]
    B: Tensor  # [R, O]
    gates: Tensor  # [N, E] or [1, E]; the same tensor as weights where ids are given
    ranks: RankMap
    base: Tensor  # [N, O]
    ids: Tensor | None  # [N, K] or [1, K]
    weights: Tensor | None  # in the shape of ids
    may_select_null: bool = True  # whether "no expert" may be among the ids
    overwrite: bool = False  # whether the result may be written into ``base``
    fp32_x: Tensor | None = None  # x in float32, where the caller already has it
    dtype: torch.dtype | None = None  # dtype of the products; None: see product_dtype

    def dense(self) -> Tensor:
        """Return the gates of all experts, [N, E] or [1, E]."""
        if self.ids is None:
            return self.gates
        experts = len(self.ranks.ranks)
        # "No expert" has the number E: its weight goes into an extra column, which is cut off.
        padded = self.gates.new_zeros(len(self.gates), experts + 1)
        return padded.scatter(1, self.ids, self.gates)[:, :experts]

    def choice_per_token(self) -> tuple[Tensor, Tensor]:
        """Return the chosen experts and their weights, a row for each token: two of [N, K]."""
        assert self.ids is not None, "only a call with chosen experts has a choice"
        assert self.weights is not None
        return self.ids.expand(len(self.x), -1), self.weights.expand(len(self.x), -1)


@dataclass(frozen=True)
class CallSpec:
    """A call, described without the values of its tensors.

    Attributes:
        tokens, in_features, out_features: N, I, O.
        ranks: the segments of R.
        chosen: K, where the numbers of each token's K experts are given; None for dense gates.
        one_row: whether one row of gates serves all tokens.
        dtype: dtype of the products.
        device: "cpu", "cuda", ….
        trains: the inputs that need gradients: "x", "experts", "gates", "base"; empty without autograd.
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
        """I + O; the work on one rank is proportional to it."""
        return self.in_features + self.out_features


class Backend(Protocol):
    """One way to compute a mixture."""

    name: str

    def supports(self, spec: CallSpec) -> str | None:
        """Return None if the backend can serve the call, else the reason why not, for the user."""

    def cost(self, spec: CallSpec, constants: Constants) -> float:
        """Predict the seconds that the mixture adds to the base layer and the router."""

    def mix(self, inputs: MixInputs) -> Tensor:
        """Return the sum of the base's output and the mixture's, [N, O], in the base's dtype."""


BACKENDS: dict[str, Backend] = {}


def register_backend(backend: Backend) -> None:
    """Register a backend under its name; of two that cost the same, the first one is chosen."""
    assert backend.name not in BACKENDS, backend.name
    BACKENDS[backend.name] = backend


def product_dtype(x_NI: Tensor, A_RI: Tensor) -> torch.dtype:
    """Return the dtype of the products: autocast's, else the wider one of input and experts, as in PEFT."""
    same = x_NI.dtype == A_RI.dtype
    dtype = x_NI.dtype if same else torch.promote_types(x_NI.dtype, A_RI.dtype)
    device = x_NI.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype
