"""One forward pass: what its caller asked for, what is known of it, and who records its decisions.

Shape legend, used as suffixes of local tensors in every maths file of this package:

    B batch    T sequence    N tokens = B·T    S prompt segments (turns)
    I in features    O out features    R total rank = Σ r_e
    E experts    X experts plus the null expert, where there is one (else X = E)    K top-k

Modules keep no state between calls. What a caller asks for lives in one :class:`Request`, a forward pass in
one :class:`RoutingContext`; both are found through a :class:`Slot`. A pass reads the request once, when it
begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .decision import Routing

__all__ = [
    "Controls",
    "Generation",
    "Request",
    "Routing",
    "RoutingConstraints",
    "RoutingContext",
    "RoutingInputs",
    "RoutingRecord",
    "Slot",
    "below",
    "bound_to",
    "current_context",
    "current_request",
    "enter_context",
    "leave_context",
    "record_routing",
    "requesting",
    "routing_inputs",
]

T = TypeVar("T")


class Slot(Generic[T]):
    """A variable of the running call that ``torch.compile`` can read as well; None at first.

    Each thread and each task has its own value. The compiler's tracer knows no ``ContextVar``: while it
    traces, a slot is a plain attribute, which the tracer guards. What is set around a compiled call is then
    seen in the call, and another value compiles again.
    """

    def __init__(self, name: str) -> None:
        self._variable: ContextVar[T | None] = ContextVar(name, default=None)
        # What the tracer sees: the value that was set last, in whatever thread.
        self._traced: T | None = None

    def get(self) -> T | None:
        """Return the value of this thread or task."""
        return self._traced if torch.compiler.is_compiling() else self._variable.get()

    def set(self, value: T | None) -> tuple[T | None, Token[T | None] | None]:
        """Put in a value. Pass the result to :meth:`reset` to take the value out again."""
        before, self._traced = self._traced, value
        return before, None if torch.compiler.is_compiling() else self._variable.set(value)

    def reset(self, token: tuple[T | None, Token[T | None] | None]) -> None:
        """Put back the value that was there before."""
        self._traced, variable = token
        if variable is not None:
            self._variable.reset(variable)


@dataclass(frozen=True)
class Controls:
    """Masks, temperature and fixed gates, in the caller's words; see :mod:`peft_moe.routing.controls`.

    Attributes:
        experts: names of the experts that may be used; None for all.
        temperature: the divisor of the scores in place of ``router_temperature``; None keeps that.
        gates: weight by expert's name, for every token; None lets the router decide.
    """

    experts: tuple[str, ...] | None = None
    temperature: float | None = None
    gates: Mapping[str, float] | None = None


@dataclass
class RoutingInputs:
    """What a caller knows of its batch beyond the model's own arguments; see :func:`routing_inputs`.

    ``prompt_used`` is set by the first pass that reads the mask. Later passes that continue its KV cache
    follow the decision of that pass.
    """

    prompt_mask: Tensor | None = None
    domains: Tensor | None = None
    gates: Tensor | None = None
    experts: Sequence[str | None] | None = None
    prompt_used: bool = False


@dataclass
class Generation:
    """One call that a user makes: one forward pass, or one whole generation.

    Attributes:
        prompt_shape: rows and width of the ids that the user passed; None where the call has none.
        decisions: the prompt's decisions, by adapter and router. Steps without a KV cache follow them; such a
            step sees the whole text and would otherwise pool over the completion.
    """

    prompt_shape: tuple[int, int] | None = None
    decisions: dict[str, dict[str, Routing]] = field(default_factory=dict)


@dataclass
class Request:
    """What the caller asks for, beyond the model's arguments. It is replaced, never changed.

    Attributes:
        controls: masks, temperature and fixed gates; None for none.
        inputs: what the caller says of the batch; None for nothing.
        recorder: collects the decisions; None where nothing is recorded.
        row_adapters: an adapter for each row (PEFT's ``adapter_names``); None for the active ones.
        generation: the call that runs; None where the model is called without PEFT's wrapper.
    """

    controls: Controls | None = None
    inputs: RoutingInputs | None = None
    recorder: RoutingRecord | None = None
    row_adapters: tuple[str, ...] | None = None
    generation: Generation | None = None


@dataclass
class RoutingConstraints:
    """A caller's controls for one mixture and one forward pass, in numbers.

    Attributes:
        masked_columns: columns of the router that get no mass.
        masked_shared: shared experts whose gates are 0.
        score_scale: the factor of the scores: ``router_temperature`` divided by the caller's temperature.
        rows: expert of each sequence, long [B], or ``ROUTER`` or ``NO_EXPERT``; None where no row is named.
    """

    masked_columns: tuple[int, ...] = ()
    masked_shared: tuple[int, ...] = ()
    score_scale: float = 1.0
    rows: Tensor | None = None


@dataclass
class RoutingContext:
    """What is known of one forward pass of the model that carries a mixture.

    Attributes:
        real: True at real tokens, False at padding, bool [B, T]; None if the call has no mask.
        prompt: True at tokens that a pooled decision may look at, bool [B, T]; None means ``real``.
        prompt_missing: some row has no prompt token, so that nothing can be pooled for it.
        segment: number of the turn that a token belongs to, long [B, T]; None for one turn.
        num_segments: S, how many turns the longest row holds.
        shape: (B, T) of this call's tokens; None where the call takes no token sequence.
        input_ids: the tokens, long [B, T]; None where the call brings embeddings.
        domains: column of the right expert (-1 unknown) per sequence, long [B], or per token, [B, T];
            from the caller.
        gates: the caller's own gates [B|1, T|1, E], which every layer uses instead of asking a router.
        adapters: the mixtures that run in this pass.
        row_adapters: an adapter for each row of the batch; None where every row has all of ``adapters``.
        recorder: collects this pass's decisions; None where nothing is recorded.
        generation: the user's call that this pass belongs to.
        constraints: what the caller allows the routers, by adapter.
        model_decisions: decisions of scope "model", by adapter; for layers below a tap by :func:`below`.
        retake: adapters whose model decision was first taken in a layer that is recomputed now.
        cached_decisions: decisions per prompt that this call continues, by adapter and router.
        new_decisions: decisions per prompt that this call takes, by adapter and router.
        probing: True while the base alone runs up to a tap; mixture layers then step aside.
        probe_until: the layer before which that run stops.
        probe_caches: caches of probes that this pass started, by adapter.
        upcasts: the last small input in float32, for the next layer that reads it; made by the routers.
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
    adapters: Sequence[str] = ()
    row_adapters: tuple[str, ...] | None = None
    recorder: RoutingRecord | None = None
    generation: Generation | None = None
    constraints: dict[str, RoutingConstraints] = field(default_factory=dict)
    model_decisions: dict[str, Routing] = field(default_factory=dict)
    retake: frozenset[str] = frozenset()
    cached_decisions: dict[str, dict[str, Routing]] = field(default_factory=dict)
    new_decisions: dict[str, dict[str, Routing]] = field(default_factory=dict)
    probing: bool = False
    probe_until: Any = None
    probe_caches: dict[str, Any] = field(default_factory=dict)
    upcasts: Any = None
    parent: RoutingContext | None = None

    def decide(self, adapter: str, name: str, take: Callable[[Tensor | None], Routing]) -> Routing:
        """A decision that outlives its call: one per prompt, or one that follows the text.

        A call that continues another one follows the prompt's decision of that one.

        Args:
            adapter: the adapter's name.
            name: the router's.
            take: decides anew, from the summary of the text before [B, I], or None.
        """
        cached = self.cached_decisions[adapter][name] if adapter in self.cached_decisions else None
        if cached is not None and cached.running is None:
            return cached
        routing = take(None if cached is None or cached.running is None else cached.running[:, -1])
        self.new_decisions.setdefault(adapter, {})[name] = routing
        return routing


@dataclass
class RoutingRecord:
    """The decisions of the last forward pass, by router name, with the pass they belong to.

    A router that decides again (a recomputed layer) overwrites its own entry, so that nothing is
    counted twice.
    """

    decisions: dict[str, Routing] = field(default_factory=dict)
    context: RoutingContext | None = None
    with_grad_only: bool = False
    is_open: bool = True

    def begin(self, context: RoutingContext) -> bool:
        """Forget the previous pass, for one that starts now; False if that one is not recorded."""
        if self.with_grad_only and not torch.is_grad_enabled():
            return False
        self.decisions.clear()
        self.context = context
        return True

    def add(self, name: str, routing: Routing, context: RoutingContext | None) -> None:
        """Take in a decision of a pass, while that pass is the recorded one."""
        heard = torch.is_grad_enabled() or not self.with_grad_only
        if heard and self.is_open and (context is None or context is self.context):
            self.decisions[name] = routing


def below(adapter: str) -> str:
    """The key in ``model_decisions`` of what the layers below the tap of ``adapter`` follow."""
    return f"{adapter}/below"  # no adapter's name has a slash


_context = Slot[RoutingContext]("peft_moe_context")
_request = Slot[Request]("peft_moe_request")


def current_context() -> RoutingContext | None:
    """The forward pass that is running, None outside of one."""
    # As Slot.get, without its call: every layer asks.
    return _context._traced if torch.compiler.is_compiling() else _context._variable.get()


def enter_context(context: RoutingContext) -> None:
    """Make ``context`` the running one; it remembers which one it interrupts."""
    context.parent = _context.get()
    _context.set(context)
    if context.recorder is not None and not context.recorder.begin(context):
        context.recorder = None


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


def current_request() -> Request:
    """What the caller asks for right now."""
    return _request.get() or Request()


@contextmanager
def requesting(request: Request) -> Iterator[None]:
    """Run a block with another request."""
    token = _request.set(request)
    try:
        yield
    finally:
        _request.reset(token)


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
            Around ``generate`` it covers the prompt that ``generate`` is called with.
        domains: router column of each sequence's expert, long [B], or of each token's, [B, T]; -1 for
            unknown.
        gates: weights of all experts for each sequence, [B, E] or [1, E], or for each token, [B, T, E]:
            every layer uses them, and no router is asked. Beams get the weights of their sequence.
        experts: an expert's name for each sequence, which alone is on; None leaves the row to the router,
            "base" uses no expert. ``gates`` take precedence.
    """
    inputs = RoutingInputs(prompt_mask=prompt_mask, domains=domains, gates=gates, experts=experts)
    with requesting(replace(current_request(), inputs=inputs)):
        yield inputs


@contextmanager
def record_routing(*, with_grad_only: bool = False) -> Iterator[RoutingRecord]:
    """Collect the decisions of the forward passes inside the block; the last pass wins.

    Args:
        with_grad_only: ignore passes without gradients. A trainer asks for this, since it may run
            further passes for its metrics between the one that counts and the backward pass.
    """
    record = RoutingRecord(with_grad_only=with_grad_only)
    try:
        with requesting(replace(current_request(), recorder=record)):
            yield record
    finally:
        record.is_open = False
