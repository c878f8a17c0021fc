"""Which constant gates an export has: the router's own, or those that the user fixes.

Letters: E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import PeftMoeError
from ..routing.controls import check_gates
from ..tuner.layers.resolve_controls import fixed_gates
from .mixture_tensors import Mixture


def read_gates(text: str) -> dict[str, float]:
    """Gates of a command line: ``math=0.5,code=0.5``, or ``math`` alone for one expert at weight 1.

    Raises:
        PeftMoeError: something else.
    """
    gates: dict[str, float] = {}
    for part in text.split(","):
        name, sign, number = (piece.strip() for piece in part.partition("="))
        try:
            weight = float(number) if sign else 1.0
        except ValueError:
            weight = float("nan")
        if not name or name in gates or math.isnan(weight):
            raise PeftMoeError(
                f"--gates {text!r} must name each expert once, as in 'math=0.5,code=0.5' or 'math'"
            )
        gates[name] = weight
    return gates


def constant_gates(mixture: Mixture, gates: Mapping[str, float] | None, kind: str) -> dict[str, Tensor]:
    """Gates [E] of every module.

    Args:
        mixture: what is exported.
        gates: weight by expert, for all modules; None takes the router's own.
        kind: of the export, for messages.

    Raises:
        PeftMoeError: the router's gates depend on the input; names the ways that work.
    """
    if gates is not None:
        check_gates(gates)
        _refuse_block(mixture, kind == "lora" and [weight for weight in gates.values() if weight] == [1])
        fixed_E = torch.tensor(fixed_gates(gates, mixture.adapter, mixture.config), dtype=torch.float32)
        if not bool(fixed_E.any()):
            raise PeftMoeError(
                f"gates={dict(gates)} are all 0, which is the base alone; there is nothing to export"
            )
        return dict.fromkeys(mixture.layers, fixed_E)
    if mixture.config.scorer.reads_input:
        first = mixture.config.expert_names[0]
        raise PeftMoeError(
            f"{mixture.label} routes by its input (router={mixture.config.router!r}), so that no single "
            f"LoRA or weight equals it and `--to {kind}` cannot be exact. What works: fix the gates "
            f"(--gates {first}=1.0, or several), train one LoRA to imitate it (--to distilled-lora --rank 32 "
            "--data texts.jsonl), take the experts out (--to adapters), or serve the mixture itself with "
            "peft_moe imported"
        )
    _refuse_block(mixture, False)
    return {module: mixture.gates(module).detach() for module in mixture.layers}


def _refuse_block(mixture: Mixture, alone: bool) -> None:
    # One expert at weight 1 is that expert, wherever its outputs are mixed.
    if mixture.config.mixing == "block" and not alone:
        raise PeftMoeError(
            f"{mixture.label} mixes whole feed-forward networks (mixing='block'), whose sum is no LoRA: fix "
            f"one expert at weight 1 (--gates {mixture.config.expert_names[0]}), train one to imitate it "
            "(--to distilled-lora), take the experts out (--to adapters), or serve it with peft_moe imported"
        )


def shared_gates(mixture: Mixture, gates: Mapping[str, Tensor]) -> dict[str, float] | None:
    """Weight by expert, where all modules have the same."""
    first, *others = gates.values()
    if any(not torch.equal(first, other) for other in others):
        return None
    return dict(zip(mixture.config.expert_names, (float(gate) for gate in first), strict=True))
