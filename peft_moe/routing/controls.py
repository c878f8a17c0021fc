"""A caller's controls at run time: masks, temperature and fixed gates.

Every control is a context manager that changes the caller's :class:`~peft_moe.routing.context.Request`.
Nothing is written into the model, and threads do not see each other's controls. A forward pass reads the
controls once, when it begins, so that a layer which is recomputed later finds the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from ..errors import PeftMoeError, near_matches
from ..io.values import is_not_negative, is_positive
from .context import Controls, current_request, requesting

NULL_NAMES = ("base", "null")
"""Words for "no expert"; no expert can have such a name."""
ROUTER, NO_EXPERT = -1, -2
"""In place of an expert's number in a row: the router decides, or no expert is on."""


def current_controls() -> Controls | None:
    """The controls that hold right now; None if there are none."""
    return current_request().controls


@contextmanager
def _holding(**changes: Any) -> Iterator[None]:
    request = current_request()
    controls = replace(request.controls or Controls(), **changes)
    with requesting(replace(request, controls=controls)):
        yield


def use_experts(*names: str) -> AbstractContextManager[None]:
    """Let routers choose among these experts only; all others get no mass.

    Masked columns are removed before the selection, and the router's normalisation runs over the others.
    Softmax weights sum to 1 again, and the next best expert takes the free place of the top k. Sigmoid
    weights are divided by the sum of the kept ones if ``norm_topk_prob``. ReLU and unnormalised weights of
    the others do not change. Shared experts are masked as well, unless they are named. A decision per
    prompt keeps its scores in the KV cache and is masked again in every step, so that the block may begin
    and end in the middle of a generation. Losses see the router's own scores.

    Args:
        names: of the experts; "null" (or "base") for a mixture's null expert, which is masked unless named.

    Raises:
        PeftMoeError: no name; at the forward pass, a name that the mixture does not have. The method of the
            same name on a model raises at once.
    """
    check_names(names)
    return _holding(experts=names)


def use_temperature(temperature: float) -> AbstractContextManager[None]:
    """Divide scores by ``temperature`` instead of ``router_temperature``; below 1 the gates get sharper.

    Raises:
        PeftMoeError: not a finite number above 0.
    """
    check_temperature(temperature)
    return _holding(temperature=float(temperature))


def use_gates(weights: Mapping[str, float]) -> AbstractContextManager[None]:
    """Use fixed gates for every token and layer, and ask no router.

    ``routing_inputs(gates=…)`` takes precedence.

    Args:
        weights: by expert's name, 0 for those left out; they need not sum to 1. Shared experts count as well.

    Raises:
        PeftMoeError: a weight that is negative or no finite number; a name, as in :func:`use_experts`.
    """
    check_gates(weights)
    return _holding(gates=dict(weights))


def check_names(names: Sequence[str]) -> None:
    """Check names before the mixture is known.

    Raises:
        PeftMoeError: there are no names, or one is not a text.
    """
    if not names:
        raise PeftMoeError(
            "use_experts() masks every expert; name at least one, or use `with model.disable_adapter()` for "
            "the base alone"
        )
    for name in names:
        if not isinstance(name, str):
            raise PeftMoeError(
                f"use_experts: {name!r} is no name; write the experts' names as text, one after another"
            )


def check_temperature(temperature: Any) -> None:
    """Check that a temperature is a finite number above 0.

    Raises:
        PeftMoeError: it is not.
    """
    if not is_positive(temperature):
        raise PeftMoeError(f"temperature={temperature!r} must be a finite number > 0; below 1 sharpens")


def check_gates(weights: Any) -> None:
    """Check weights before the mixture is known.

    Raises:
        PeftMoeError: they are not a mapping of names to finite numbers ≥ 0.
    """
    if not isinstance(weights, Mapping) or not weights:
        raise PeftMoeError(f"gates={weights!r} must map names to weights, as in {{'math': 0.7, 'law': 0.3}}")
    for name, weight in weights.items():
        if not is_not_negative(weight):
            raise PeftMoeError(f"gates[{name!r}]={weight!r} must be a finite number ≥ 0; 0 leaves it out")


def resolve(name: str, names: Sequence[str], *, adapter: str, argument: str, null: bool) -> int:
    """Return the index of an expert by its name, or ``NO_EXPERT``.

    Args:
        name: the name that the caller wrote.
        names: names of the mixture's experts, in order.
        adapter: name of the mixture.
        argument: where the caller wrote it, for the message.
        null: whether "base" and "null" stand for "no expert" here.

    Raises:
        PeftMoeError: the mixture has no expert of that name; the message lists near matches.
    """
    if name in names:
        return list(names).index(name)
    if name in NULL_NAMES and null:
        return NO_EXPERT
    if name in NULL_NAMES:
        raise PeftMoeError(
            f"{argument}: {name!r} is the null expert's name, and mixture {adapter!r} has null_expert=False; "
            "leave it out, or use `with model.disable_adapter()` for the base alone"
        )
    options = [*names, *(NULL_NAMES if null else ())]
    raise PeftMoeError(
        f"{argument}: {name!r} is no expert of mixture {adapter!r}.{near_matches(name, options)}"
    )
