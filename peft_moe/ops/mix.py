"""The one entry point: a mixture on one linear layer, by whichever form is cheapest.

Letters: N tokens, I in, O out, R total rank, E experts, K chosen experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import MixInputs
from .choose import BackendChoice, call_spec_of, choose
from .rank_map import RankMap

# Kinds of calls whose choice a layer remembers; prompts come in many lengths.
_REMEMBERED = 512


def mix(
    x_NI: Tensor,
    A_RI: Tensor,
    B_RO: Tensor,
    gates_NE: Tensor | None,
    ranks: RankMap,
    base_NO: Tensor,
    *,
    expert_ids_NK: Tensor | None = None,
    weights_NK: Tensor | None = None,
    may_select_null: bool = True,
    backend: str | None = None,
    overwrite: bool = False,
    fp32_NI: Tensor | None = None,
) -> Tensor:
    """``base + Σ_e gate_e · scaling_e · (x Aₑᵀ) Bₑ``.

    The products run in the wider dtype of input and experts, as in PEFT (under autocast in its dtype); the
    sum is taken once, in the dtype of ``base_NO``.

    Args:
        x_NI: the layer's input, [N, I].
        A_RI: the experts' A factors on one rank axis, [R, I].
        B_RO: their B factors, transposed against LoRA, on the same axis, [R, O].
        gates_NE: weight of each expert for each token, [N, E] or [1, E]; not looked at where the chosen ones
            are given.
        ranks: the segments of R.
        base_NO: output of the frozen base layer, [N, O].
        expert_ids_NK: where every token keeps K experts, their numbers, distinct; [N, K], or [1, K] where
            one row serves all tokens. E stands for "no expert". All other gates are zero.
        weights_NK: the gates of these, in the same shape; gradients for the gates go here then.
        may_select_null: whether "no expert" may be among the chosen; False saves looking for it.
        backend: a form's name; None or "auto" takes the cheapest one.
        overwrite: the caller has no more use for ``base_NO``: where there is no graph, and the form can, the
            sum takes its place. Saves an [N, O] and a pass over it.
        fp32_NI: ``x_NI`` in float32, where it is at hand.

    Returns:
        [N, O].

    Raises:
        PeftMoeError: the form that was asked for is unknown, or cannot serve this call.
    """
    if ranks.total == 0 or x_NI.shape[0] == 0:
        return base_NO
    # A compiler decides by itself where a sum goes.
    own = (overwrite and not torch.is_grad_enabled() and not torch.compiler.is_compiling(), fp32_NI)
    if weights_NK is None:
        assert gates_NE is not None, "gates for all experts, or the chosen ones"
        inputs = MixInputs(x_NI, A_RI, B_RO, gates_NE, ranks, base_NO, None, None, False, *own)
    else:
        assert expert_ids_NK is not None, "weights of whom?"
        chosen = (expert_ids_NK, weights_NK, may_select_null)
        inputs = MixInputs(x_NI, A_RI, B_RO, weights_NK, ranks, base_NO, *chosen, *own)
    return _choice(inputs, backend).backend.mix(inputs)


def _choice(inputs: MixInputs, backend: str | None) -> BackendChoice:
    if torch.compiler.is_compiling():
        return choose(call_spec_of(inputs), backend)
    x_NI, A_RI, B_RO, gates, ranks, base_NO, ids_NK, *_ = inputs
    device = x_NI.device.type
    grads = torch.is_grad_enabled() and (
        x_NI.requires_grad,
        A_RI.requires_grad or B_RO.requires_grad,
        gates.requires_grad,
        base_NO.requires_grad,
    )
    key = (
        (x_NI.shape, B_RO.shape[1], gates.shape, ids_NK is None),
        (x_NI.dtype, A_RI.dtype, device, torch.is_autocast_enabled(device)),
        (grads, backend),
    )
    found: BackendChoice | None = ranks.choices.get(key)
    if found is None:
        if len(ranks.choices) >= _REMEMBERED:
            ranks.choices.clear()
        found = ranks.choices[key] = choose(call_spec_of(inputs), backend)
    return found
