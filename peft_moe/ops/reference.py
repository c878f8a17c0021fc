"""The meaning of a mixture, as a plain loop over experts: the oracle that every other form must equal.

Letters: N tokens, I in, O out, R total rank, E experts.
"""

from __future__ import annotations

from torch import Tensor

from .ranks import RankMap


def mix_reference(
    x_NI: Tensor, A_RI: Tensor, B_RO: Tensor, gates_NE: Tensor, ranks: RankMap, base_NO: Tensor
) -> Tensor:
    """``base + Σ_e gate_e · scaling_e · (x Aₑᵀ) Bₑ``, one expert after another.

    Args:
        x_NI: the layer's input, [N, I].
        A_RI: the experts' A factors on one rank axis, [R, I].
        B_RO: their B factors, transposed against LoRA, on the same axis, [R, O].
        gates_NE: weight of each expert for each token, [N, E] or [1, E].
        ranks: the segments of R.
        base_NO: output of the frozen base layer, [N, O].

    Returns:
        [N, O]. Any float dtype; float64 is what golden numbers are made with.
    """
    out_NO = base_NO
    for expert, segment in enumerate(ranks.slices()):
        if ranks.ranks[expert]:
            delta_NO = (x_NI @ A_RI[segment].T) @ B_RO[segment]
            out_NO = out_NO + gates_NE[:, expert : expert + 1] * ranks.scaling[expert] * delta_NO
    return out_NO
