"""Each method is compared with the reference loop, on the model that is timed, before any figure is taken.

At each adapted layer the method's output is compared with the sum over its experts in float64, with the gates
that the method itself used: once as it is timed, and once with the same numbers in float32, where rounding
cannot hide an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from peft_moe.errors import PeftMoeError
from peft_moe.ops import RankMap, mix_reference

from .experts import DTYPE, Experts, adapted
from .methods import Method, dtypes_of

# In bf16, relative to the output of E experts: 2^-9 · √(E + 16). X-LoRA rounds its running sum once per
# expert, by up to 2^-9 in either direction; the 16 covers h, gates, weights and the base.
BF16_BOUND = 2**-9
# In float32, relative to the experts' sum: products of up to 2048 terms, 2^-24 each, in any order.
FP32_BOUND = 1e-4


class ParityError(Exception):
    """A method computes something else than the reference, so no figure of it may be published."""


def admit(
    methods: dict[str, Method], experts: Experts, inputs: Tensor, missing: dict[str, str]
) -> dict[str, Method]:
    """Return the methods that pass :func:`check`; add backends that cannot serve the call to ``missing``."""
    admitted = {}
    for name, method in methods.items():
        method.model.eval()
        try:
            check(name, method, experts, inputs)
        except PeftMoeError as reason:
            missing[name] = str(reason)
        else:
            admitted[name] = method
    return admitted


def check(name: str, method: Method, experts: Experts, inputs: Tensor) -> None:
    """Compare every adapted layer in two passes: as it is timed, and with all its weights in float32.

    Args:
        name: its name, for the message.
        method: the method as it will be timed.
        experts: its experts.
        inputs: token ids [B, T], or a layer's input [B, T, I].

    Raises:
        ParityError: an error exceeds its bound, a layer is not adapted, or the experts have another dtype.
    """
    if method.gates is None:
        return
    layers, dtypes = dict(adapted(method.model)), dtypes_of(method.model)
    if sorted(layers) != sorted(experts.names) or dtypes != {DTYPE}:
        raise ParityError(f"{name}: adapts {len(layers)} of {len(experts.names)} layers, in {dtypes}")
    bf16_bound = BF16_BOUND * (experts.count + 16) ** 0.5
    for fp32, bound in ((False, bf16_bound), (True, FP32_BOUND)):
        with _in_fp32(method.model) if fp32 else nullcontext():
            errors = _errors(
                method,
                layers,
                experts,
                inputs.float() if fp32 and inputs.is_floating_point() else inputs,
                fp32,
            )
        worst = max(errors, key=errors.__getitem__)
        if not errors[worst] <= bound:
            raise ParityError(
                f"{name}: {worst} is {errors[worst]:.1e} off the reference, more than {bound:.1e}"
            )


@contextmanager
def _in_fp32(model: nn.Module) -> Iterator[None]:
    """Convert the model's numbers to float32, and restore the original tensors afterwards."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.dtype == DTYPE]
    originals = [t.data for t in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, data in zip(tensors, originals, strict=True):
            tensor.data = data


def _errors(
    method: Method, layers: dict[str, nn.Module], experts: Experts, inputs: Tensor, fp32: bool
) -> dict[str, float]:
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with ExitStack() as stack, torch.no_grad():
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(_keep(seen, name)).remove)
        context = method.watch() if method.watch is not None else nullcontext()
        try:
            method.model(inputs)
        finally:
            context.__exit__(None, None, None)
        return {
            name: _error(method, layer, name, experts, *seen[name], fp32) for name, layer in layers.items()
        }


def _keep(seen: dict[str, tuple[Tensor, Tensor]], name: str):
    def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = (args[0].detach().clone(), output.detach().clone())

    return hook


def _error(
    method: Method, layer: nn.Module, name: str, experts: Experts, x: Tensor, y: Tensor, fp32: bool
) -> float:
    x_NI, y_NO = x.flatten(0, -2), y.flatten(0, -2).double()
    count = method.count
    A_RI, B_RO = experts.stacked(name, count)
    gates_NE = method.gates(layer, name, x_NI).double()  # type: ignore[misc]  # checked above
    ranks = RankMap((experts.rank,) * count, (1.0,) * count)
    base_NO = x_NI.double() @ layer.base_layer.weight.double().T
    expected_NO = mix_reference(x_NI.double(), A_RI.double(), B_RO.double(), gates_NE, ranks, base_NO)
    scale_NO = expected_NO - base_NO if fp32 else expected_NO
    return float((y_NO - expected_NO).norm() / scale_NO.norm())
