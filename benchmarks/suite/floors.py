"""The shortest time that the necessary work can take on this machine.

It counts the base's products, those of each token's k chosen experts, and each array that they must read or
write once. It does not count the router, norms and activations. A floor is the longer one of arithmetic and
memory traffic.

Letters: N tokens, I in, O out, R active rank, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from .experts import DTYPE, Case
from .machine import Peaks

BYTES = 2  # per bf16 number


@dataclass(frozen=True)
class Floor:
    """FLOPs, bytes and seconds of the base with its experts; ``added`` is the experts' part in seconds."""

    flops: float
    bytes: float
    seconds: float
    added: float

    def __add__(self, other: Floor) -> Floor:
        return Floor(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.seconds + other.seconds,
            self.added + other.added,
        )


def linear_floor(
    width: int, out: int, tokens: int, active: float, touched: float, peaks: Peaks, passes: int = 1
) -> Floor:
    """Return the floor of one linear layer with experts.

    Args:
        width, out, tokens: I, O, N.
        active: ranks that one token uses.
        touched: ranks that any token uses, whose weights are read.
        peaks: the machine's rates.
        passes: 1 forward; 2 with the backward pass to the input, experts frozen.
    """
    base = 2.0 * tokens * width * out, BYTES * (tokens * (width + out) + width * out)
    experts = (
        2.0 * tokens * active * (width + out),
        # The input is read; the output is read and written.
        BYTES * (tokens * (width + 2 * out) + touched * (width + out)) if active else 0.0,
    )
    seconds = [max(f / peaks.flops[DTYPE], b / peaks.bytes) * passes for f, b in (base, experts)]
    return Floor(
        passes * (base[0] + experts[0]), passes * (base[1] + experts[1]), seconds[0] + seconds[1], seconds[1]
    )


def ranks(case: Case, name: str, tokens: int) -> tuple[float, float]:
    """Return the active and the touched ranks of a method: those of a LoRA, or of k experts of E."""
    r, E = case.rank, case.experts
    fixed = {"base": 0, "LoRA r": r, "LoRA k·r": case.active * r, "LoRA E·r": E * r}
    if name in fixed:
        return fixed[name], fixed[name]
    hit = E * (1 - (1 - case.active / E) ** tokens)
    return case.active * r, hit * r


def floor(case: Case, name: str, peaks: Peaks, *, passes: int = 1, decoding: bool = False) -> Floor:
    """Return the floor of one call of a method: a layer, a prefill, a training step, or a decode step."""
    tokens = 1 if decoding else case.batch * case.tokens
    active, touched = ranks(case, name, tokens)
    if case.width is not None and case.out is not None:
        return linear_floor(case.width, case.out, tokens, active, touched, peaks, passes)
    sizes = case.sizes
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    keys = hidden * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    total = linear_floor(hidden, sizes["vocab_size"], tokens, 0, 0, peaks, passes)
    layer = [(hidden, hidden)] * 2 + [(hidden, keys)] * 2 + [(hidden, inner)] * 2 + [(inner, hidden)]
    for width, out in layer * sizes["num_hidden_layers"]:
        total += linear_floor(width, out, tokens, active, touched, peaks, passes)
    if not decoding:  # attention scores and their product with the values, causal
        attention = passes * 2.0 * case.batch * case.tokens**2 * hidden * sizes["num_hidden_layers"]
        total += Floor(attention, 0, attention / peaks.flops[DTYPE], 0)
    return total
