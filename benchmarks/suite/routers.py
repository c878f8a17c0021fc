"""Level "routers": the cost of each router, relative to the mixture without gates.

The floor of a probe is tap/layers of a bare pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from .clock import Variant, interleave, ratios, spread
from .experts import TINY_LLAMA, Case, Experts, make_base
from .methods import Method, mixture
from .models import STEPS, decode, prefill
from .parity import check
from .results import Row

CASE = Case(experts=8, rank=8, top_k=None)
GATELESS = "gate-less"
PROMPT = {"router": "context", "null_expert": True}
TOKEN = {**PROMPT, "router_granularity": "token"}
ROUTERS: dict[str, dict[str, Any]] = {
    GATELESS: {"router": "uniform"},
    "linear, per module": {"router": "linear"},
    "linear, per block": {"router": "linear", "router_scope": "block"},
    "per prompt, probe": PROMPT,
    "per prompt, base": {**PROMPT, "router_below_tap": "base"},
    "per token, probe": TOKEN,
    "per token, prompt below": {**TOKEN, "router_below_tap": "prompt"},
    "per token, base": {**TOKEN, "router_below_tap": "base"},
    "running, probe": {"router": "running"},
    "running, base": {"router": "running", "router_below_tap": "base"},
}


def measure(quick: bool, say: Callable[[str], None]) -> Iterator[Row]:
    """Measure prefill and decoding with every router."""
    case = (
        replace(CASE, experts=2, sizes={**TINY_LLAMA, "num_hidden_layers": 2}, tokens=48) if quick else CASE
    )
    base = make_base(case)
    experts = Experts(base, case)
    methods = {"base": Method(copy.deepcopy(base), mixes=False)}
    ids = torch.randint(0, case.sizes["vocab_size"], (case.batch, case.tokens))
    for name, fields in ROUTERS.items():
        methods[name] = mixture(copy.deepcopy(base), experts, case, **{"top_k": None, **fields})
        methods[name].model.eval()
        # Only these two have a gate per layer.
        if fields in (ROUTERS[GATELESS], ROUTERS["linear, per module"]):
            check(name, methods[name], experts, ids[:, :16])
    for step, make in (("prefill", prefill), ("decode", decode)):
        variants: dict[str, Variant] = {name: make(c, ids) for name, c in methods.items()}
        with torch.no_grad():
            times = interleave(variants, budget=0.2 if quick else 15, fewest=3 if quick else 5)
        for name, values in times.items():
            per_call = STEPS if step == "decode" else 1
            row = Row("routers", step, case, name, milliseconds=spread([1e3 * v / per_call for v in values]))
            row.to[GATELESS] = ratios(times, name, GATELESS)
            yield row
        say(f"routers: {step}")
