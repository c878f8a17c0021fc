"""The definition of a mixture, as a plain loop over experts. Every other backend must equal it.

Letters: N tokens, I in, O out, R total rank, E experts.
"""

from __future__ import annotations

from torch import Tensor

from ..backend import CallSpec, MixInputs, product_dtype
from ..device_costs import Constants
from ..rank_map import RankMap


def mix_reference(
    x_NI: Tensor, A_RI: Tensor, B_RO: Tensor, gates_NE: Tensor, ranks: RankMap, base_NO: Tensor
) -> Tensor:
    """Return ``base + Σ_e gate_e · scaling_e · (x Aₑᵀ) Bₑ``, summed one expert after another.

    Args:
        x_NI: the layer's input, [N, I].
        A_RI: the experts' A factors on one rank axis, [R, I].
        B_RO: their B factors, transposed against LoRA, on the same axis, [R, O].
        gates_NE: weight of each expert for each token, [N, E] or [1, E].
        ranks: the segments of R.
        base_NO: output of the frozen base layer, [N, O].

    Returns:
        [N, O], in any float dtype; golden numbers are made in float64.
    """
    out_NO = base_NO
    for expert, segment in enumerate(ranks.slices()):
        if ranks.ranks[expert]:
            delta_NO = (x_NI @ A_RI[segment].T) @ B_RO[segment]
            out_NO = out_NO + gates_NE[:, expert : expert + 1] * ranks.scaling[expert] * delta_NO
    return out_NO


class Reference:
    """Every expert on every token, by plain torch operations, so that it can be differentiated twice."""

    name = "reference"

    def supports(self, spec: CallSpec) -> str | None:
        """Return None: every call is supported."""
        return None

    def cost(self, spec: CallSpec, constants: Constants) -> float:
        """Count two products per expert, and four passes over the output."""
        elements = spec.tokens * len(spec.ranks.ranks) * spec.out_features
        work = 2 * spec.tokens * spec.ranks.total * spec.sizes / constants.flops
        traffic = 4 * elements * spec.dtype.itemsize / constants.bandwidth
        return work + traffic + len(spec.ranks.ranks) * (2 * constants.segment + constants.launch)

    def mix(self, inputs: MixInputs) -> Tensor:
        """Run :func:`mix_reference` with its products in one dtype and its sum in the base's dtype."""
        x_NI, A_RI, B_RO, _, ranks, base_NO, *_ = inputs
        gates_NE = inputs.dense()
        dtype = inputs.dtype or product_dtype(x_NI, A_RI)
        out_NO = mix_reference(x_NI.to(dtype), A_RI.to(dtype), B_RO.to(dtype), gates_NE, ranks, base_NO)
        return out_NO.to(base_NO.dtype)
