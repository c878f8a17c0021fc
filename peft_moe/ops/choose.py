"""The choice of the backend that serves a call: the cheapest one that can, by a model of FLOPs and bytes.

The choice must depend on the call and the device alone, so that two runs compute the same bits, and it must
take no time in a decode step. It therefore uses a model and measures nothing at run time. The model needs
a few constants per device (``device_costs``); ``benchmarks/calibrate.py`` fits them.

Letters: N tokens, I in, O out, R total rank, E experts, K chosen experts.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from ..errors import PeftMoeError, near_matches
from .backend import BACKENDS, Backend, CallSpec, MixInputs, product_dtype
from .device_costs import constants_for

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BackendChoice:
    """The backend that serves a kind of call, and the reasons.

    Attributes:
        backend: the chosen one.
        costs: predicted seconds of every backend that could serve the call, cheapest first.
        refused: the other backends, with their reasons.
        dtype: dtype of the products.
        asked: the name that was asked for; None where the cost model chose.
    """

    backend: Backend
    costs: dict[str, float]
    refused: dict[str, str]
    dtype: torch.dtype
    asked: str | None = None

    def explain(self) -> str:
        """Return a few lines: the choice, its reason, the predicted costs, the refusals."""
        why = "asked for" if self.asked else "cheapest by the model"
        lines = [f"{self.backend.name}: {why}"]
        lines += [f"  {name}: {1e6 * cost:.1f} us predicted" for name, cost in self.costs.items()]
        lines += [f"  {name}: not here, {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


def check_backend(name: str) -> None:
    """Refuse a name that is neither "auto" nor a backend's.

    Raises:
        PeftMoeError: the name is unknown; the message lists near matches.
    """
    if not isinstance(name, str) or (name != "auto" and name not in BACKENDS):
        raise PeftMoeError(f"backend={name!r} is not known.{near_matches(str(name), ['auto', *BACKENDS])}")


def call_spec_of(inputs: MixInputs) -> CallSpec:
    """Describe a call by its tensors' shapes, dtypes and devices, without reading their values."""
    x_NI, A_RI, B_RO, gates, ranks, base_NO, ids_NK, *_ = inputs
    trains = set()
    if torch.is_grad_enabled():
        groups = {"x": (x_NI,), "experts": (A_RI, B_RO), "gates": (gates,), "base": (base_NO,)}
        trains = {name for name, tensors in groups.items() if any(t.requires_grad for t in tensors)}
    return CallSpec(
        tokens=x_NI.shape[0],
        in_features=x_NI.shape[1],
        out_features=B_RO.shape[1],
        ranks=ranks,
        chosen=None if ids_NK is None else ids_NK.shape[-1],
        one_row=gates.shape[0] == 1,
        dtype=product_dtype(x_NI, A_RI),
        device=x_NI.device.type,
        trains=frozenset(trains),
        compiling=torch.compiler.is_compiling(),
    )


def choose(spec: CallSpec, name: str | None = None) -> BackendChoice:
    """Choose the backend for a call.

    Args:
        spec: the call.
        name: the backend to take; None or "auto" takes the cheapest one.

    Raises:
        PeftMoeError: no backend has that name, or it cannot serve the call; the message gives the reason.
    """
    constants = constants_for(spec.device, spec.dtype)
    if name is not None and name != "auto":
        check_backend(name)
        backend = BACKENDS[name]
        reason = backend.supports(spec)
        if reason is not None:
            raise PeftMoeError(f"backend={name!r} cannot serve this call: {reason}; use backend='auto'")
        return BackendChoice(backend, {name: backend.cost(spec, constants)}, {}, spec.dtype, name)
    costs, refused = {}, {}
    for candidate, backend in BACKENDS.items():
        reason = backend.supports(spec)
        if reason is None:
            costs[candidate] = backend.cost(spec, constants)
        else:
            refused[candidate] = reason
    # The sort is stable: of equal costs, the backend that was registered first wins.
    costs = dict(sorted(costs.items(), key=lambda item: item[1]))
    choice = BackendChoice(BACKENDS[next(iter(costs))], costs, refused, spec.dtype)
    if not spec.compiling and _log.isEnabledFor(logging.DEBUG):
        _log.debug("%d tokens, %s: %s", spec.tokens, spec.dtype, choice.explain())
    return choice
