"""Triton's backends, for CUDA: where their kernels can serve, and what they cost.

This file imports no Triton; ``mix`` of each backend imports its kernels. It may not be called ``backends``:
torch.compile refuses to trace any file below "triton/backends", which it takes for one of Triton's own.

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
# A program holds all ranks of one expert in registers.
_MAX_RANK = 128
_MAX_CHOSEN, _MAX_EXPERTS = 16, 2047
# The most tokens of a decode step.
_MAX_DECODE_TOKENS = 64


@cache
def _unavailable() -> str | None:
    """Return the reason why no kernel can run on this machine, or None."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "its kernels need a CUDA device"
    if torch.version.hip is not None:
        return "its kernels have never been tested on ROCm"
    if torch.cuda.get_device_capability() < (8, 0):
        return "its kernels need a GPU of compute capability 8.0 or newer"
    return None


def _unsupported(spec: CallSpec) -> str | None:
    """Return the reason why no kernel can serve the call, or None."""
    if spec.device != "cuda" and not interpreted():
        return f"its kernels run on CUDA, these tensors are on {spec.device}"
    if spec.dtype not in _DTYPES:
        return f"its kernels do not support {spec.dtype}"
    if spec.ranks.width > _MAX_RANK:
        return f"an expert has rank {spec.ranks.width}; its kernels hold at most {_MAX_RANK}"
    if spec.compiling:
        return "torch.compile makes its own kernels from the other backends"
    if "experts" in spec.trains:
        return "its kernels have no gradient for experts"
    return _unavailable()


def _unsupported_sparse(spec: CallSpec) -> str | None:
    """Return the reason why no kernel of chosen experts can serve the call, or None."""
    if spec.chosen is None:
        return NO_TOP_K
    if spec.chosen > _MAX_CHOSEN or len(spec.ranks.ranks) > _MAX_EXPERTS:
        return f"it serves up to {_MAX_CHOSEN} chosen experts of up to {_MAX_EXPERTS}"
    return _unsupported(spec)


def _cast(inputs: MixInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the input and both factors in the dtype of the products."""
    dtype = inputs.dtype or product_dtype(inputs.x, inputs.A)
    return inputs.x.to(dtype), inputs.A.to(dtype), inputs.B.to(dtype)


def _kernel_constants(name: str, spec: CallSpec, constants: Constants) -> Kernel | None:
    """Return the kernel's constants if it was timed at calls like this one and was the fastest, else None.

    Without constants the kernel serves only users who ask for it by name, because an estimate must not win
    over backends that were measured.
    """
    kernel = constants.kernels.get(name)
    if kernel is None or spec.tokens < kernel.tokens or (spec.trains and not kernel.trains):
        return None
    return kernel


class TritonStacked:
    """All experts in two products; the first product applies the gates before it leaves its registers."""

    name = "triton_stacked"

    def supports(self, spec: CallSpec) -> str | None:
        """Refuse trained experts, and gate gradients of ranks that are unequal or no powers of two."""
        ranks = spec.ranks
        if "gates" in spec.trains and not (ranks.equal and ranks.width & (ranks.width - 1) == 0):
            return "its gradient of the gates needs equal ranks that are powers of two"
        if (spec.chosen or 0) > _MAX_CHOSEN:
            return f"it serves up to {_MAX_CHOSEN} chosen experts"
        return _unsupported(spec)

    def cost(self, spec: CallSpec, constants: Constants) -> float:
        """Count the products of all ranks, or the traffic of x, y and the factors if that takes longer."""
        kernel = _kernel_constants(self.name, spec, constants)
        if kernel is None:
            return NEVER_CHEAPEST
        ranks, item = spec.ranks.total, spec.dtype.itemsize
        work = 2 * spec.tokens * ranks * spec.sizes / constants.flops
        traffic = spec.tokens * (spec.in_features + 2 * spec.out_features) * item / constants.bandwidth
        weights = kernel.slabs * ranks * spec.sizes * item / constants.bandwidth
        return max(work, traffic + weights) + kernel.launch

    def mix(self, inputs: MixInputs) -> Tensor:
        """Run :func:`peft_moe.ops.triton.mix.mix_fused`."""
        from .mix import mix_fused

        if inputs.ids is None:
            gates, ids = inputs.gates, None
        else:
            ids, gates = inputs.choice_per_token()
        return mix_fused(*_cast(inputs), inputs.ranks, inputs.base, gates, ids)


class TritonSorted:
    """Tokens sorted by expert on the device; only the chosen experts' products are computed."""

    name = "triton_sorted"

    def supports(self, spec: CallSpec) -> str | None:
        """Refuse trained experts, and calls without a fixed number of chosen experts."""
        return _unsupported_sparse(spec)

    def cost(self, spec: CallSpec, constants: Constants) -> float:
        """Count a row of x read and a row of y read and written per chosen pair, and the slabs per block."""
        kernel = _kernel_constants(self.name, spec, constants)
        if kernel is None:
            return NEVER_CHEAPEST
        chosen, item = spec.chosen or 0, spec.dtype.itemsize
        rows = spec.tokens * chosen * (spec.in_features + 2 * spec.out_features) * item
        slabs = min(len(spec.ranks.ranks), spec.tokens) * chosen * spec.ranks.width * spec.sizes * item
        return (rows + kernel.slabs * slabs) / constants.bandwidth + kernel.launch

    def mix(self, inputs: MixInputs) -> Tensor:
        """Run :func:`peft_moe.ops.triton.mix.mix_sorted`."""
        from .mix import mix_sorted

        return mix_sorted(*_cast(inputs), inputs.ranks, inputs.base, *inputs.choice_per_token())


class TritonGather:
    """Decode steps: two launches that read only the chosen experts' slabs and fit into a CUDA graph."""

    name = "triton_gather"

    def supports(self, spec: CallSpec) -> str | None:
        """Refuse gradients, many tokens, and calls without a fixed number of chosen experts."""
        if spec.trains:
            return "it has no gradients"
        if spec.tokens > _MAX_DECODE_TOKENS:
            return f"it serves up to {_MAX_DECODE_TOKENS} tokens, this call has {spec.tokens}"
        return _unsupported_sparse(spec)

    def cost(self, spec: CallSpec, constants: Constants) -> float:
        """Count the chosen slabs of every token."""
        kernel = _kernel_constants(self.name, spec, constants)
        if kernel is None:
            return NEVER_CHEAPEST
        slabs = spec.tokens * (spec.chosen or 0) * spec.ranks.width * spec.sizes * spec.dtype.itemsize
        return kernel.slabs * slabs / constants.bandwidth + kernel.launch

    def mix(self, inputs: MixInputs) -> Tensor:
        """Run :func:`peft_moe.ops.triton.mix.mix_gathered`."""
        from .mix import mix_gathered

        return mix_gathered(*_cast(inputs), inputs.ranks, inputs.base, *inputs.choice_per_token())
