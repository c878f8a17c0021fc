"""What passes between the parts of a mixture: a decision, the call it belongs to, and its recorder.

Shape legend, used as suffixes of local tensors in every maths file of this package:

    B batch    T sequence    N tokens = B·T    S prompt segments (turns)
    I in features    O out features    R total rank = Σ r_e
    E experts    X experts plus the null expert, where there is one (else X = E)    K top-k

Nothing here imports a higher part of the package, and modules keep no state between calls: what a
forward pass needs to know lives in one :class:`RoutingContext`, found through a :class:`Slot`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .controls import Limits
from .decision import Routing
from .slots import Slot
from .wide_copy import WideCopy

__all__ = [
    "Routing",
    "RoutingContext",
    "RoutingInputs",
    "RoutingRecord",
    "below",
    "bound_to",
    "current_context",
    "current_inputs",
    "enter_context",
    "is_recording",
    "leave_context",
    "record_routing",
    "report",
    "routing_inputs",
]


@dataclass
class RoutingContext:
    """What is known of one forward pass of the model that carries a mixture.

    Attributes:
        real: True at real tokens, False at padding, bool [B, T]; None if the call has no mask.
        prompt: True at tokens that a pooled decision may look at, bool [B, T]; None means ``real``.
        prompt_missing: some row has no prompt token, so that nothing can be pooled for it.
        segment: number of the turn that a token belongs to, long [B, T]; None for one turn.
        num_segments: S, how many turns the longest row holds.
        shape: (B, T) of this call's tokens, None where it takes no token sequence.
        input_ids: the tokens, long [B, T]; None where the call brings embeddings.
        domains: column of the right expert (-1 unknown) per sequence, long [B], or per token, [B, T];
            from the caller.
        gates: the caller's own gates [B|1, T|1, E], which every layer uses instead of asking a router.
        limits: what the caller allows the routers, by adapter; see :mod:`peft_moe.controls`.
        shared: decisions of scope "model", by adapter; and by :func:`below` for the layers below a tap.
        retake: adapters whose entry in ``shared`` a layer that is recomputed now made in its first run.
        kept: decisions per prompt that this call continues, by adapter and router.
        decided: decisions per prompt that this call took, by adapter and router.
        probing: True while the base alone runs up to a tap; mixture layers then step aside.
        probe_until: the layer before which that run stops.
        probe_caches: caches of probes that this pass started, by adapter.
        wide: the last small input in float32, for the next layer that is given it; None before the first.
        parent: the context that this one interrupts.
    """

    real: Tensor | None = None
    prompt: Tensor | None = None
    prompt_missing: bool = False
    segment: Tensor | None = None
    num_segments: int = 1
    shape: tuple[int, int] | None = None
    input_ids: Tensor | None = None
    domains: Tensor | None = None
    gates: Tensor | None = None
    limits: dict[str, Limits] = field(default_factory=dict)
    shared: dict[str, Routing] = field(default_factory=dict)
    retake: frozenset[str] = frozenset()
    kept: dict[str, dict[str, Routing]] = field(default_factory=dict)
    decided: dict[str, dict[str, Routing]] = field(default_factory=dict)
    probing: bool = False
    probe_until: Any = None
    probe_caches: dict[str, Any] = field(default_factory=dict)
    wide: WideCopy | None = None
    parent: RoutingContext | None = None

    def widened(self, x: Tensor) -> Tensor | None:
        """``x`` in float32, where that is kept for the next layer; else None."""
        if self.wide is None:  # made here, where no compiler traces
            self.wide = WideCopy()
        return self.wide.make(x)

    def decide(self, adapter: str, name: str, take: Callable[[Tensor | None], Routing]) -> Routing:
        """A decision that outlives its call: one per prompt, or one that follows the text.

        The one per prompt is that of the call which is continued, if there is one.

        Args:
            adapter: the adapter's name.
            name: the router's.
            take: decides anew, from the summary of what came before [B, I], or None.
        """
        kept = self.kept[adapter][name] if adapter in self.kept else None
        if kept is not None and kept.running is None:
            return kept
        routing = take(None if kept is None or kept.running is None else kept.running[:, -1])
        self.decided.setdefault(adapter, {})[name] = routing
        return routing


@dataclass
class RoutingInputs:
    """What a caller knows of its batch beyond the model's own arguments; see :func:`routing_inputs`.

    ``prompt_used`` is set by the first pass that read the mask: steps that continue its KV cache follow
    the decision that was taken then.
    """

    prompt_mask: Tensor | None = None
    domains: Tensor | None = None
    gates: Tensor | None = None
    experts: Sequence[str | None] | None = None
    prompt_used: bool = False


@dataclass
class RoutingRecord:
    """The decisions of the last forward pass, by router name, with the pass they belong to.

    A router that decides again (a recomputed layer) overwrites its own entry, so that nothing is
    counted twice.
    """

    decisions: dict[str, Routing] = field(default_factory=dict)
    context: RoutingContext | None = None
    with_grad_only: bool = False

    def begin(self, context: RoutingContext) -> None:
        """A new forward pass starts: forget the previous one."""
        if torch.is_grad_enabled() or not self.with_grad_only:
            self.decisions.clear()
            self.context = context


def below(adapter: str) -> str:
    """The key in ``RoutingContext.shared`` of what the layers below the tap of ``adapter`` follow."""
    return f"{adapter}/below"  # no adapter's name has a slash


_context = Slot[RoutingContext]("peft_moe_context")
_inputs = Slot[RoutingInputs]("peft_moe_inputs")
_record = Slot[RoutingRecord]("peft_moe_record")


def current_context() -> RoutingContext | None:
    """The forward pass that is running, None outside of one."""
    return _context.get()


def enter_context(context: RoutingContext) -> None:
    """Make ``context`` the running one; it remembers which it interrupts."""
    context.parent = _context.get()
    _context.set(context)
    record = _record.get()
    if record is not None:
        record.begin(context)


def leave_context() -> None:
    """Return to the context that the running one interrupted."""
    context = _context.get()
    _context.set(context.parent if context is not None else None)


@contextmanager
def bound_to(context: RoutingContext | None) -> Iterator[None]:
    """Run a block as part of ``context``: what a recomputed layer needs in the backward pass."""
    token = _context.set(context)
    try:
        yield
    finally:
        _context.reset(token)


def current_inputs() -> RoutingInputs | None:
    """What the caller said of its batch, None if nothing."""
    return _inputs.get()


@contextmanager
def routing_inputs(
    *,
    prompt_mask: Tensor | None = None,
    domains: Tensor | None = None,
    gates: Tensor | None = None,
    experts: Sequence[str | None] | None = None,
) -> Iterator[RoutingInputs]:
    """Tell the routers what the model's arguments do not say.

    Args:
        prompt_mask: True at prompt tokens, bool [B, T]. A router that decides once per prompt pools
            over these only, and takes a new decision wherever a new run of them begins. Without it
            the prompt is found from ``labels`` (where they are -100), else it is every real token.
            Around ``generate`` it covers the prompt that is given to it.
        domains: router column of each sequence's expert, long [B], or of each token's, [B, T]; -1 for
            unknown.
        gates: weights of all experts for each sequence, [B, E] or [1, E], or for each token, [B, T, E]:
            every layer uses them, and no router is asked. A row per beam is made where there are several.
        experts: an expert's name for each sequence, which alone is on; None leaves the row to the router,
            "base" uses no expert. ``gates`` go before.
    """
    inputs = RoutingInputs(prompt_mask=prompt_mask, domains=domains, gates=gates, experts=experts)
    token = _inputs.set(inputs)
    try:
        yield inputs
    finally:
        _inputs.reset(token)


@contextmanager
def record_routing(*, with_grad_only: bool = False) -> Iterator[RoutingRecord]:
    """Collect the decisions of the forward passes inside the block; the last pass wins.

    Args:
        with_grad_only: ignore passes without gradients. A trainer asks for this, since it may run
            further passes for its metrics between the one that counts and the backward pass.
    """
    record = RoutingRecord(with_grad_only=with_grad_only)
    token = _record.set(record)
    try:
        yield record
    finally:
        _record.reset(token)


def is_recording() -> bool:
    """Whether anybody collects decisions right now."""
    return _record.get() is not None


def report(name: str, routing: Routing) -> None:
    """Hand a decision to the recorder, if anybody listens."""
    record = _record.get()
    if record is not None and (torch.is_grad_enabled() or not record.with_grad_only):
        record.decisions[name] = routing
