"""Named methods: a few words of data over the parts, never classes.

A preset fills the fields of ``MoLoraConfig`` that the user left at None; ``scorer`` is the registered
name of what scores. A registered scorer without a preset is its own preset.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # The paper's noisy gate: white noise of small variance, then top-k.
    "random": {"scorer": "random", "router_init_std": 0.02, "top_k": 2},
    # One decision per prompt for the whole model, taken where the base has read enough of it to know
    # the task; hard, since strong experts do not survive being mixed; free to choose the base itself.
    "context": {
        "scorer": "linear",
        "router_scope": "model",
        "router_granularity": "sequence",
        "router_input_norm": True,
        "top_k": 1,
        "straight_through": True,
        "null_expert": True,
    },
}
