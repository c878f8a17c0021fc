"""Which form serves a call: the cheapest of those that can, by a model of FLOPs and bytes.

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
    """What serves a kind of call, and why.

    Attributes:
        form: the one that was chosen.
        costs: predicted seconds of every form that could serve it, cheapest first.
        refused: the others, with their reasons.
        asked: the name that was asked for; None where the model chose.
    """

    form: Backend
    costs: dict[str, float]
    refused: dict[str, str]
    asked: str | None = None

    def explain(self) -> str:
        """In a few lines: what, why, and at which predicted cost."""
        why = "asked for" if self.asked else "cheapest by the model"
        lines = [f"{self.form.name}: {why}"]
        lines += [f"  {name}: {1e6 * cost:.1f} us predicted" for name, cost in self.costs.items()]
        lines += [f"  {name}: not here, {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


def check_backend(name: str) -> None:
    """Refuse a name that no form has.

    Raises:
        PeftMoeError: with near matches.
    """
    if not isinstance(name, str) or (name != "auto" and name not in BACKENDS):
        raise PeftMoeError(f"backend={name!r} is not known.{near_matches(str(name), ['auto', *BACKENDS])}")


def call_spec_of(operands: MixInputs) -> CallSpec:
    """What a call's tensors say of it, without their numbers."""
    x_NI, A_RI, B_RO, gates, ranks, base_NO, ids_NK, *_ = operands
    trains = set()
    if torch.is_grad_enabled():
        wanted = {"x": (x_NI,), "experts": (A_RI, B_RO), "gates": (gates,), "base": (base_NO,)}
        trains = {name for name, tensors in wanted.items() if any(t.requires_grad for t in tensors)}
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


def choose(facts: CallSpec, backend: str | None = None) -> BackendChoice:
    """The cheapest form for a call.

    Args:
        facts: the call.
        backend: a form's name, which is then taken; None or "auto" lets the model choose.

    Raises:
        PeftMoeError: no form has that name, or it cannot serve the call; with the reason.
    """
    constants = constants_for(facts.device, facts.dtype)
    if backend is not None and backend != "auto":
        check_backend(backend)
        form = BACKENDS[backend]
        reason = form.supports(facts)
        if reason is not None:
            raise PeftMoeError(f"backend={backend!r} cannot serve this call: {reason}; use backend='auto'")
        return BackendChoice(form, {backend: form.cost(facts, constants)}, {}, backend)
    costs, refused = {}, {}
    for name, form in BACKENDS.items():
        reason = form.supports(facts)
        if reason is None:
            costs[name] = form.cost(facts, constants)
        else:
            refused[name] = reason
    costs = dict(sorted(costs.items(), key=lambda item: item[1]))
    choice = BackendChoice(BACKENDS[next(iter(costs))], costs, refused)
    if not facts.compiling and _log.isEnabledFor(logging.DEBUG):
        _log.debug("%d tokens, %s: %s", facts.tokens, facts.dtype, choice.explain())
    return choice
