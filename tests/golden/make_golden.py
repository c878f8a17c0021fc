"""Golden numbers: full small tensors and gradients from plain loops in float64.

    python tests/golden/make_golden.py [folder]

writes ``mixture.json``, ``gates.json`` and ``losses.json`` beside this file (or into ``folder``). It
shares no code with the package: everything is written out per token, per expert, per rank. Gradients
are central differences of the same loops, extrapolated once (Richardson), good to about 1e-9.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray
HERE = Path(__file__).parent
STEP = 1e-3


def numbers(*shape: int, seed: int, scale: float = 1.0) -> Array:
    """Made by a formula instead of a generator, whose stream could change with its version."""
    count = int(np.prod(shape))
    # Six digits, so that the files hold the inputs exactly.
    values = [round(scale * math.sin(1.7 * (i + 1) + 0.9 * seed + 0.3 * (i % 5)), 6) for i in range(count)]
    return np.array(values, dtype=np.float64).reshape(shape)


def gradient(function: Callable[[Array], float], at: Array) -> Array:
    """Central differences with steps h and 2h, combined so that the error is of order h⁴."""
    result = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        slopes = []
        for step in (STEP, 2 * STEP):
            plus, minus = at.copy(), at.copy()
            plus[index] += step
            minus[index] -= step
            slopes.append((function(plus) - function(minus)) / (2 * step))
        result[index] = (4 * slopes[0] - slopes[1]) / 3
    return result


# Layer: base + Σ_e gate_e · alpha_e / r_e · B_e A_e x


def layer(
    x: Array, a: Array, b: Array, gates: Array, base: Array, ranks: list[int], alphas: list[float]
) -> Array:
    out = base.copy()
    for n in range(x.shape[0]):
        first = 0
        for e, rank in enumerate(ranks):
            for r in range(first, first + rank):
                inner = sum(a[r, i] * x[n, i] for i in range(x.shape[1]))
                for o in range(out.shape[1]):
                    out[n, o] += gates[n, e] * alphas[e] / rank * inner * b[r, o]
            first += rank
    return out


def mixture_case(ranks: list[int], alphas: list[float], seed: int) -> dict[str, Any]:
    tokens, width, outs, total = 3, 4, 2, sum(ranks)
    given = {
        "x": numbers(tokens, width, seed=seed),
        "A": numbers(total, width, seed=seed + 1),
        "B": numbers(total, outs, seed=seed + 2),
        "gates": np.abs(numbers(tokens, len(ranks), seed=seed + 3)),
        "base": numbers(tokens, outs, seed=seed + 4),
    }
    direction = numbers(tokens, outs, seed=seed + 5)

    def along(**changed: Array) -> float:
        t = {**given, **changed}
        return float((layer(t["x"], t["A"], t["B"], t["gates"], t["base"], ranks, alphas) * direction).sum())

    return {
        "ranks": ranks,
        "alphas": alphas,
        "inputs": given,
        "direction": direction,
        "output": layer(**{k.lower(): v for k, v in given.items()}, ranks=ranks, alphas=alphas),
        "gradients": {
            name: gradient(lambda value, n=name: along(**{n: value}), at) for name, at in given.items()
        },
    }


# Router: logits = W x + b, then gates


def linear(x: Array, w: Array, bias: Array) -> Array:
    z = np.zeros((*x.shape[:-1], w.shape[0]))
    for index in np.ndindex(z.shape):
        z[index] = bias[index[-1]] + sum(w[index[-1], i] * x[(*index[:-1], i)] for i in range(x.shape[-1]))
    return z


def gates_of(z: Array, how: dict[str, Any]) -> tuple[Array, Array]:
    """Gates and, for straight-through, the dense gates whose gradient they take."""
    columns, experts = z.shape[-1], z.shape[-1] - int(how["null_expert"])
    hard, soft = np.zeros_like(z), np.zeros_like(z)
    for index in np.ndindex(z.shape[:-1]):
        row = [v / how["temperature"] for v in z[index]]
        if how["scoring_func"] == "softmax":
            total = sum(math.exp(v) for v in row)
            dense = [math.exp(v) / total for v in row]
        else:
            dense = [1 / (1 + math.exp(-v)) for v in row]
        kept = sorted(range(columns), key=lambda e, row=row: -row[e])[: how["top_k"] or columns]
        for target, members in ((hard, kept), (soft, range(columns))):
            norm = sum(dense[e] for e in members) if how["norm_topk_prob"] else 1.0
            for e in members:
                target[index][e] = dense[e] / norm
    return hard[..., :experts], soft[..., :experts]


def gates_case(seed: int, **how: Any) -> dict[str, Any]:
    how = {
        "top_k": None,
        "scoring_func": "softmax",
        "norm_topk_prob": True,
        "straight_through": False,
        "null_expert": False,
        "temperature": 1.0,
        **how,
    }
    x, w, bias = (
        numbers(2, 3, 4, seed=seed),
        numbers(3, 4, seed=seed + 1),
        numbers(3, seed=seed + 2, scale=0.5),
    )
    direction = numbers(2, 3, 3 - int(how["null_expert"]), seed=seed + 3)

    def along(x: Array, w: Array, bias: Array) -> float:
        hard, soft = gates_of(linear(x, w, bias), how)
        return float(((soft if how["straight_through"] else hard) * direction).sum())

    return {
        "settings": how,
        "inputs": {"x": x, "weight": w, "bias": bias},
        "direction": direction,
        "gates": gates_of(linear(x, w, bias), how)[0],
        "gradients": {
            "x": gradient(lambda v: along(v, w, bias), x),
            "weight": gradient(lambda v: along(x, v, bias), w),
            "bias": gradient(lambda v: along(x, w, v), bias),
        },
    }


# Losses: of one layer, over real tokens


DELTA = 0.1


def losses_of(z: Array, real: list[list[int]], domains: list[int], k: int) -> dict[str, float]:
    columns, tokens, labelled = z.shape[-1], 0, 0
    share, mean, squares, cross = [0.0] * columns, [0.0] * columns, 0.0, 0.0
    entropy, kept, scaled = 0.0, 0.0, []
    for b, t in np.ndindex(z.shape[:2]):
        if not real[b][t]:
            continue
        tokens += 1
        total = sum(math.exp(v) for v in z[b, t])
        best = sorted(range(columns), key=lambda e, row=z[b, t]: -row[e])[:k]
        for e in best:
            share[e] += 1
            # The gates are renormalised over those that were kept.
            kept += math.exp(z[b, t, e]) / sum(math.exp(z[b, t, other]) for other in best) / columns
        for e in range(columns):
            p = math.exp(z[b, t, e]) / total
            mean[e] += p
            entropy -= p * math.log(p)
        squares += math.log(total) ** 2
        if domains[b] >= 0:
            labelled += 1
            cross += math.log(total) - z[b, t, domains[b]]
    for b in range(len(z)):
        if domains[b] >= 0:
            there = [z[b, t] for t in range(len(z[b])) if real[b][t]]
            for e in range(columns):
                p = sum(math.exp(row[e]) / sum(math.exp(v) for v in row) for row in there) / len(there)
                scaled.append(p * (1 - DELTA if e == domains[b] else 1 + DELTA))
    middle = sum(scaled) / len(scaled)
    return {
        "router_aux_loss_coef": columns
        * sum(s / tokens * p / tokens for s, p in zip(share, mean, strict=True)),
        "router_z_loss_coef": squares / tokens,
        "router_entropy_coef": entropy / tokens,
        "router_label_loss_coef": cross / labelled,
        "router_lbc_coef": sum((s - middle) ** 2 for s in scaled) / len(scaled) / middle**2,
        "router_l1_coef": kept / tokens,
    }


def losses_case(seed: int, k: int) -> dict[str, Any]:
    z = numbers(3, 4, 4, seed=seed, scale=1.5)
    real, domains = [[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]], [3, -1, 1]
    values = losses_of(z, real, domains, k)
    return {
        "top_k": k,
        "logits": z,
        "real": real,
        "domains": domains,
        "values": values,
        "gradients": {
            name: gradient(lambda v, n=name: losses_of(v, real, domains, k)[n], z) for name in values
        },
    }


def cases() -> dict[str, dict[str, Any]]:
    """File name -> case name -> numbers."""
    return {
        "mixture": {
            "equal ranks": mixture_case([2, 2], [2.0, 2.0], seed=1),
            "unequal ranks and alphas": mixture_case([1, 3, 2], [4.0, 1.5, 2.0], seed=2),
            "an expert that is not here": mixture_case([2, 0, 1], [2.0, 8.0, 3.0], seed=3),
        },
        "gates": {
            "dense": gates_case(10),
            "dense, cold": gates_case(11, temperature=0.5),
            "top-2": gates_case(12, top_k=2),
            "top-2, not renormalised": gates_case(13, top_k=2, norm_topk_prob=False),
            "null": gates_case(14, null_expert=True),
            "null, top-2": gates_case(15, null_expert=True, top_k=2),
            "straight-through": gates_case(16, top_k=1, straight_through=True, null_expert=True),
            "sigmoid": gates_case(17, scoring_func="sigmoid"),
            "sigmoid, top-2, not renormalised": gates_case(
                18, scoring_func="sigmoid", top_k=2, norm_topk_prob=False
            ),
        },
        "losses": {"top-1": losses_case(20, 1), "top-2": losses_case(21, 2)},
    }


def rounded(value: Any) -> Any:
    """JSON-ready, to 11 digits after the point."""
    if isinstance(value, np.ndarray):
        return rounded(value.tolist())
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return round(value, 11) if isinstance(value, float) else value


def main(folder: Path = HERE) -> None:
    """Write the files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in cases().items():
        lines = ",\n".join(
            f"{json.dumps(case)}: {json.dumps(rounded(data))}" for case, data in content.items()
        )
        (folder / f"{name}.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:2]))
