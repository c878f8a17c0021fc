"""One row of gates for all tokens makes the mixture a single LoRA: the gates are multiplied into B once.

Letters: N tokens, I in, O out, R total rank, E experts.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from ..backend import CallSpec, MixInputs, product_dtype
from ..device_costs import Constants
from ..mix import add_product
from ..rank_map import RankMap


class Folded:
    """One row of gates, multiplied into B instead of into h at every token.

    The gates go into B even where A is smaller, because their gradient then needs h and not x. The predicted
    cost is the same with and without gradients, so that training, evaluation and a reloaded mixture choose
    the same backend and compute the same bits.
    """

    name = "folded"

    def supports(self, spec: CallSpec) -> str | None:
        """Refuse calls whose gates differ between tokens."""
        return None if spec.one_row else "its gates differ from token to token"

    def cost(self, spec: CallSpec, constants: Constants) -> float:
        """Count the products of one LoRA, and one pass over B."""
        ranks, item = spec.ranks.total, spec.dtype.itemsize
        work = 2 * spec.tokens * ranks * spec.sizes / constants.flops
        rows = spec.tokens * (spec.in_features + 2 * spec.out_features)
        traffic = (rows + ranks * spec.sizes) * item / constants.bandwidth
        fold = constants.per_rank * ranks * spec.out_features
        return max(work, traffic) + fold + constants.launch

    def mix(self, inputs: MixInputs) -> Tensor:
        """Return ``base + (x Aᵀ) (gates ∘ B)``."""
        x_NI, A_RI, B_RO, _, ranks, base_NO, *_ = inputs
        dtype = inputs.dtype or product_dtype(x_NI, A_RI)
        A_RI, B_RO = A_RI.to(dtype), B_RO.to(dtype)
        gates_R1 = ranks.expand(inputs.dense()[0]).to(dtype)[:, None]
        h_NR = functional.linear(x_NI.to(dtype), A_RI)
        return add_product(base_NO, h_NR, B_RO * gates_R1, inputs.overwrite)


def folded_delta(A_RI: Tensor, B_RO: Tensor, gates_E: Tensor, ranks: RankMap) -> Tensor:
    """Return the weight change of constant gates, [O, I], for merging.

    Args:
        A_RI, B_RO: the stacked factors.
        gates_E: one weight per expert, [E].
        ranks: the segments of R.
    """
    gates_R = ranks.expand(gates_E).to(B_RO.dtype)
    return (B_RO * gates_R[:, None]).T @ A_RI
