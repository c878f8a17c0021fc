"""Every contestant against the plain loop, on the very model that is timed: no figure without it.

At each adapted layer the contestant's output is compared with the sum over experts in float64, with the gates
that the contestant itself used and the experts that it was given: once as it is timed, and once with the same
numbers in float32, where rounding hides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from peft_moe.errors import PeftMoeError
from peft_moe.ops import RankMap, mix_reference

from .contestants import Contestant, dtypes_of
from .experts import DTYPE, Experts, adapted

# In bf16, of the output, for E experts: 2^-9 · √(E + 16). X-LoRA rounds its running sum once for each expert,
# by up to 2^-9 every time and in either direction; the rest covers h, gates, weights and the base.
NARROW_BOUND = 2**-9
# In float32, of what the experts add: products of up to 2048 terms, 2^-24 each, in any order.
WIDE_BOUND = 1e-4


class ParityError(Exception):
    """A contestant computes something else than the reference: nothing about it may be published."""


def admit(
    contestants: dict[str, Contestant], experts: Experts, inputs: Tensor, missing: dict[str, str]
) -> dict[str, Contestant]:
    """Those that pass :func:`check`; a backend that cannot serve the call is ``missing``, with its reason."""
    admitted = {}
    for name, contestant in contestants.items():
        contestant.model.eval()
        try:
            check(name, contestant, experts, inputs)
        except PeftMoeError as reason:
            missing[name] = str(reason)
        else:
            admitted[name] = contestant
    return admitted


def check(name: str, contestant: Contestant, experts: Experts, inputs: Tensor) -> None:
    """Compare every adapted layer in two passes: as it is timed, and with all its weights in float32.

    Args:
        name: for the message.
        contestant: as it will be timed.
        experts: what it was given.
        inputs: token ids [B, T], or a layer's input [B, T, I].

    Raises:
        ParityError: an error beyond the bounds, a layer that was not adapted, or experts of another dtype.
    """
    if contestant.gates is None:
        return
    layers, dtypes = dict(adapted(contestant.model)), dtypes_of(contestant.model)
    if sorted(layers) != sorted(experts.names) or dtypes != {DTYPE}:
        raise ParityError(f"{name}: adapts {len(layers)} of {len(experts.names)} layers, in {dtypes}")
    narrow = NARROW_BOUND * (experts.count + 16) ** 0.5
    for wide, bound in ((False, narrow), (True, WIDE_BOUND)):
        with _widened(contestant.model) if wide else nullcontext():
            errors = _errors(
                contestant,
                layers,
                experts,
                inputs.float() if wide and inputs.is_floating_point() else inputs,
                wide,
            )
        worst = max(errors, key=errors.__getitem__)
        if not errors[worst] <= bound:
            raise ParityError(
                f"{name}: {worst} is {errors[worst]:.1e} off the reference, more than {bound:.1e}"
            )


@contextmanager
def _widened(model: nn.Module) -> Iterator[None]:
    """The same numbers in float32; the very tensors of before come back afterwards."""
    narrow = [t for t in (*model.parameters(), *model.buffers()) if t.dtype == DTYPE]
    kept = [t.data for t in narrow]
    for tensor in narrow:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, data in zip(narrow, kept, strict=True):
            tensor.data = data


def _errors(
    contestant: Contestant, layers: dict[str, nn.Module], experts: Experts, inputs: Tensor, wide: bool
) -> dict[str, float]:
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with ExitStack() as stack, torch.no_grad():
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(_keep(seen, name)).remove)
        context = contestant.watch() if contestant.watch is not None else nullcontext()
        try:
            contestant.model(inputs)
        finally:
            context.__exit__(None, None, None)
        return {
            name: _error(contestant, layer, name, experts, *seen[name], wide)
            for name, layer in layers.items()
        }


def _keep(seen: dict[str, tuple[Tensor, Tensor]], name: str):
    def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = (args[0].detach().clone(), output.detach().clone())

    return hook


def _error(
    contestant: Contestant, layer: nn.Module, name: str, experts: Experts, x: Tensor, y: Tensor, wide: bool
) -> float:
    x_NI, y_NO = x.flatten(0, -2), y.flatten(0, -2).double()
    count = contestant.count
    A_RI, B_RO = experts.stacked(name, count)
    gates_NE = contestant.gates(layer, name, x_NI).double()  # type: ignore[misc]  # checked above
    ranks = RankMap((experts.rank,) * count, (1.0,) * count)
    base_NO = x_NI.double() @ layer.base_layer.weight.double().T
    wanted_NO = mix_reference(x_NI.double(), A_RI.double(), B_RO.double(), gates_NE, ranks, base_NO)
    scale_NO = wanted_NO - base_NO if wide else wanted_NO
    return float((y_NO - wanted_NO).norm() / scale_NO.norm())
