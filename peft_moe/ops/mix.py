"""The entry point: a mixture on one linear layer, computed by the cheapest backend.

Letters: N tokens, I in, O out, R total rank, E experts, K chosen experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import MixInputs
from .choose import BackendChoice, call_spec_of, choose
from .rank_map import RankMap

# The most choices that a layer caches. Prompts come in many lengths, so the cache needs a bound.
_MAX_CACHED = 512


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
    """Return ``base + Σ_e gate_e · scaling_e · (x Aₑᵀ) Bₑ``.

    The products run in autocast's dtype where it is on, else in the wider dtype of input and experts, as in
    PEFT. The sum is rounded once, to the dtype of ``base_NO``.

    Args:
        x_NI: the layer's input, [N, I].
        A_RI: the experts' A factors on one rank axis, [R, I].
        B_RO: their B factors, transposed against LoRA, on the same axis, [R, O].
        gates_NE: weight of each expert for each token, [N, E] or [1, E]; ignored where the chosen experts
            are given.
        ranks: the segments of R.
        base_NO: output of the frozen base layer, [N, O].
        expert_ids_NK: numbers of the K experts that each token keeps, distinct; [N, K], or [1, K] where one
            row serves all tokens. E stands for "no expert". All other gates are zero.
        weights_NK: the gates of these experts, in the same shape; the gates' gradient then goes here.
        may_select_null: whether "no expert" may be among the chosen; False saves the check for it.
        backend: the name of a backend; None or "auto" takes the cheapest one.
        overwrite: the caller no longer needs ``base_NO``. Without autograd, a backend may then write the
            result into it, which saves an [N, O] and a pass over it.
        fp32_NI: ``x_NI`` in float32, where the caller already has it.

    Returns:
        [N, O].

    Raises:
        PeftMoeError: the named backend is unknown, or cannot serve this call.
    """
    if ranks.total == 0 or x_NI.shape[0] == 0:
        return base_NO
    # torch.compile plans memory by itself; autograd may need the base's output.
    overwrites = overwrite and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    gates = gates_NE if weights_NK is None else weights_NK
    assert gates is not None, "mix() needs gates_NE, or expert_ids_NK with weights_NK"
    assert (weights_NK is None) == (expert_ids_NK is None), "weights_NK and expert_ids_NK belong together"
    chosen = (expert_ids_NK, weights_NK, may_select_null and weights_NK is not None)
    tensors = (x_NI, A_RI, B_RO, gates, ranks, base_NO, *chosen, overwrites, fp32_NI)
    choice = _cached_choice(MixInputs(*tensors), backend)
    return choice.backend.mix(MixInputs(*tensors, choice.dtype))


def _cached_choice(inputs: MixInputs, backend: str | None) -> BackendChoice:
    """Return the choice for this kind of call; the layer's rank map caches it."""
    if torch.compiler.is_compiling():
        return choose(call_spec_of(inputs), backend)
    x_NI, A_RI, B_RO, gates, ranks, base_NO, ids_NK, *_ = inputs
    device = x_NI.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    grads = torch.is_grad_enabled() and (
        x_NI.requires_grad,
        A_RI.requires_grad or B_RO.requires_grad,
        gates.requires_grad,
        base_NO.requires_grad,
    )
    key = (
        (x_NI.shape, B_RO.shape[1], gates.shape, ids_NK is None),
        (x_NI.dtype, A_RI.dtype, device, autocast),
        (grads, backend),
    )
    choice: BackendChoice | None = ranks.choices.get(key)
    if choice is None:
        if len(ranks.choices) >= _MAX_CACHED:
            ranks.choices.clear()
        choice = ranks.choices[key] = choose(call_spec_of(inputs), backend)
    return choice


def add_product(
    base_NO: Tensor, hg_NR: Tensor, B_RO: Tensor, overwrite: bool, scaling: float = 1.0
) -> Tensor:
    """Return ``base + scaling · hg B`` in the base's dtype, rounded once.

    With ``overwrite`` the result is written into ``base_NO``.
    """
    base_dtype, dtype = base_NO.dtype, hg_NR.dtype
    if base_dtype == dtype:
        addmm = base_NO.addmm_ if overwrite else base_NO.addmm
        return addmm(hg_NR, B_RO, alpha=scaling)
    if torch.promote_types(base_dtype, dtype) != dtype:
        return add(base_NO, hg_NR @ B_RO, overwrite, scaling)
    # The sum goes into the converted copy, which saves a second [N, O].
    sum_NO = base_NO.to(dtype).addmm_(hg_NR, B_RO, alpha=scaling)
    return base_NO.copy_(sum_NO) if overwrite else sum_NO.to(base_dtype)


def add(base_NO: Tensor, delta_NO: Tensor, overwrite: bool, scaling: float = 1.0) -> Tensor:
    """Return ``base + scaling · delta`` in the base's dtype; with ``overwrite``, in ``base_NO``."""
    if overwrite:
        return base_NO.add_(delta_NO, alpha=scaling)
    return base_NO.add(delta_NO, alpha=scaling).to(base_NO.dtype)
