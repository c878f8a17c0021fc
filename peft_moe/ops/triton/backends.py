"""Triton's forms of the mixture, for CUDA. This file imports no Triton; it says where the kernels can serve.

Letters: N tokens, I in, O out, R total rank, E experts, K chosen experts.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ..backend import NEVER_CHEAPEST, NO_TOP_K, CallSpec, MixInputs, product_dtype
from ..device_costs import Constants, Kernel
from . import interpreted

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# What the kernels hold of one expert at a time; and how many tokens still count as a decode step.
_MAX_RANK, _FEW_TOKENS = 128, 64
_MAX_CHOSEN, _MAX_EXPERTS = 16, 2047


@cache
def _missing() -> str | None:
    """Why no kernel can run here at all."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "its kernels need a CUDA device"
    if torch.version.hip is not None:
        return "its kernels were never tried on ROCm"
    if torch.cuda.get_device_capability() < (8, 0):
        return "its kernels need a GPU of compute capability 8.0 or newer"
    return None


def _unfit(spec: CallSpec) -> str | None:
    """What all kernels need."""
    if spec.device != "cuda" and not interpreted():
        return f"its kernels run on CUDA, these tensors are on {spec.device}"
    if spec.dtype not in _DTYPES:
        return f"its kernels know no {spec.dtype}"
    if spec.ranks.width > _MAX_RANK:
        return f"an expert has rank {spec.ranks.width}; its kernels hold {_MAX_RANK} at once"
    if spec.compiling:
        return "torch.compile makes its own kernels from the other forms"
    if "experts" in spec.trains:
        return "its kernels have no gradient for experts"
    return _missing()


def _unfit_sparse(spec: CallSpec) -> str | None:
    if spec.chosen is None:
        return NO_TOP_K
    if spec.chosen > _MAX_CHOSEN or len(spec.ranks.ranks) > _MAX_EXPERTS:
        return f"it takes up to {_MAX_CHOSEN} chosen experts of {_MAX_EXPERTS}"
    return _unfit(spec)


def _ready(inputs: MixInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Input and factors in the dtype of the products."""
    wide = product_dtype(inputs.x, inputs.A)
    return inputs.x.to(wide), inputs.A.to(wide), inputs.B.to(wide)


def _timed(name: str, spec: CallSpec, constants: Constants) -> Kernel | None:
    """What is known of a kernel at calls like this one; None where it was not timed, or lost.

    Elsewhere it serves who asks for it by name: an estimate must not win over forms that were measured.
    """
    kernel = constants.kernels.get(name)
    if kernel is None or spec.tokens < kernel.tokens or (spec.trains and not kernel.trains):
        return None
    return kernel


class TritonStacked:
    """All experts in two products; the gates are applied where the first one leaves its registers."""

    name = "triton_stacked"

    def supports(self, spec: CallSpec) -> str | None:
        """Frozen experts on CUDA; with gate gradients, equal ranks that are powers of two."""
        ranks = spec.ranks
        if "gates" in spec.trains and not (ranks.equal and ranks.width & (ranks.width - 1) == 0):
            return "its gradient of the gates needs equal ranks that are powers of two"
        if (spec.chosen or 0) > _MAX_CHOSEN:
            return f"it takes up to {_MAX_CHOSEN} chosen experts"
        return _unfit(spec)

    def cost(self, spec: CallSpec, constants: Constants) -> float:
        """Products of all ranks against the passes over x and y that they cannot avoid."""
        kernel = _timed(self.name, spec, constants)
        if kernel is None:
            return NEVER_CHEAPEST
        ranks, item = spec.ranks.total, spec.dtype.itemsize
        work = 2 * spec.tokens * ranks * spec.sizes / constants.flops
        traffic = spec.tokens * (spec.in_features + 2 * spec.out_features) * item / constants.bandwidth
        weights = kernel.slabs * ranks * spec.sizes * item / constants.bandwidth
        return max(work, traffic + weights) + kernel.launch

    def mix(self, inputs: MixInputs) -> Tensor:
        """See :func:`peft_moe.ops.triton.mix.mix_fused`."""
        from .mix import mix_fused

        if inputs.ids is None:
            gates, ids = inputs.gates, None
        else:
            ids, gates = inputs.choice_per_token()
        return mix_fused(*_ready(inputs), inputs.ranks, inputs.base, gates, ids)


class TritonSorted:
    """Tokens sorted by expert on the device; only the chosen experts' products are taken."""

    name = "triton_sorted"

    def supports(self, spec: CallSpec) -> str | None:
        """Frozen experts on CUDA, and a fixed number of chosen ones."""
        return _unfit_sparse(spec)

    def cost(self, spec: CallSpec, constants: Constants) -> float:
        """Every chosen pair reads a row of x, and reads and writes a row of y; slabs are read per block."""
        kernel = _timed(self.name, spec, constants)
        if kernel is None:
            return NEVER_CHEAPEST
        chosen, item = spec.chosen or 0, spec.dtype.itemsize
        rows = spec.tokens * chosen * (spec.in_features + 2 * spec.out_features) * item
        slabs = min(len(spec.ranks.ranks), spec.tokens) * chosen * spec.ranks.width * spec.sizes * item
        return (rows + kernel.slabs * slabs) / constants.bandwidth + kernel.launch

    def mix(self, inputs: MixInputs) -> Tensor:
        """See :func:`peft_moe.ops.triton.mix.mix_sorted`."""
        from .mix import mix_sorted

        return mix_sorted(*_ready(inputs), inputs.ranks, inputs.base, *inputs.choice_per_token())


class TritonGather:
    """Decode steps: two launches that read the chosen experts' slabs only, and fit into a CUDA graph."""

    name = "triton_gather"

    def supports(self, spec: CallSpec) -> str | None:
        """Few tokens, no gradients, and a fixed number of chosen experts."""
        if spec.trains:
            return "it has no gradients"
        if spec.tokens > _FEW_TOKENS:
            return f"it is made for up to {_FEW_TOKENS} tokens, this call has {spec.tokens}"
        return _unfit_sparse(spec)

    def cost(self, spec: CallSpec, constants: Constants) -> float:
        """The slabs of every token."""
        kernel = _timed(self.name, spec, constants)
        if kernel is None:
            return NEVER_CHEAPEST
        slabs = spec.tokens * (spec.chosen or 0) * spec.ranks.width * spec.sizes * spec.dtype.itemsize
        return kernel.slabs * slabs / constants.bandwidth + kernel.launch

    def mix(self, inputs: MixInputs) -> Tensor:
        """See :func:`peft_moe.ops.triton.mix.mix_gathered`."""
        from .mix import mix_gathered

        return mix_gathered(*_ready(inputs), inputs.ranks, inputs.base, *inputs.choice_per_token())
