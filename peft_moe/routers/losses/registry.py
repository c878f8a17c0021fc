"""The registry of losses on routing decisions. A new loss is one function and one decorator.

The registry is the only list of losses. The config reads the coefficients and the reasons for a refusal from
it; trainers read the names in the log and which losses need a domain for each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from ...errors import PeftMoeError, near_matches
from ..settings import RouterSettings

LossFn = Callable[..., Tensor]
"""``(routing, weights, context, **options) → scalar``, for one layer."""
LossT = TypeVar("LossT", bound=LossFn)
Objection = Callable[[RouterSettings], str | None]

# Log entries that trainers write themselves.
_RESERVED_LOGS = ("loss", "eval_loss", "expert_orthogonality_loss", "distillation_loss")


@dataclass(frozen=True)
class Loss:
    """One registered loss.

    Attributes:
        key: its name in :data:`LOSSES`: the config field of its coefficient, or a key of ``loss_coefs``.
        function: computes it for one layer.
        log: its name in the trainer's log.
        has_field: whether the coefficient is a declared field of the config.
        needs_domains: whether it compares decisions with each sample's domain.
        options: keyword argument of the function to the config field that it takes.
        objection: tells why the loss cannot work with these settings, or None.
    """

    key: str
    function: LossFn
    log: str
    has_field: bool
    needs_domains: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    objection: Objection | None = None

    def coefficient(self, config: Any) -> float:
        """Return the weight of this loss in a config; 0 switches it off."""
        if self.has_field:
            return float(getattr(config, self.key))
        return float(config.loss_coefs.get(self.key, 0.0))

    def describe(self, config: Any) -> str:
        """Return the coefficient as an error message shows it: ``name=value``."""
        if self.has_field:
            return f"{self.key}={getattr(config, self.key)}"
        return f"loss_coefs[{self.key!r}]={config.loss_coefs.get(self.key)}"


LOSSES: dict[str, Loss] = {}


def register_loss(
    name: str | None = None,
    *,
    field: str | None = None,
    log: str | None = None,
    needs_domains: bool = False,
    options: Mapping[str, str] | None = None,
    objection: Objection | None = None,
) -> Callable[[LossT], LossT]:
    """Function decorator: trainers add this loss on routing decisions where its coefficient is not zero.

    The function takes one layer's decisions, the weight of each decision and the context of the pass, and
    returns a scalar. It sees only columns that the layer has. The loss is the mean over layers.

    Args:
        name: the key of the coefficient: ``MoLoraConfig(loss_coefs={name: 0.1})``.
        field: instead of ``name``, for losses of this package: the declared config field of the coefficient.
        log: name in the trainer's log; ``f"{name}_loss"`` by default.
        needs_domains: whether the loss reads each sample's domain. Trainers then ask for a ``domain`` column.
        options: keyword arguments of the function, and the config field that each takes.
        objection: given the router's settings, returns what follows ``name=value`` in the error message where
            the loss cannot work, such as "has no effect on dense gates; set top_k". None accepts them.

    Raises:
        PeftMoeError: the name is no text, or the name or the log's name is taken by another loss.
    """

    def add(function: LossT) -> LossT:
        key = field if field is not None else name
        if (name is None) == (field is None) or not isinstance(key, str) or not key:
            raise PeftMoeError(
                f"loss name {key!r} must be non-empty text, as in register_loss('mine'); "
                "give either a name or a field"
            )
        loss = Loss(
            key, function, log or f"{key}_loss", field is not None, needs_domains, options or {}, objection
        )
        # The same function may be registered again: a module is reloaded, or a notebook cell runs twice.
        taken = LOSSES.get(key)
        if taken is not None and _origin(taken.function) != _origin(function):
            raise PeftMoeError(f"loss name {key!r} is taken by {_origin(taken.function)}; choose another")
        logs = {*_RESERVED_LOGS, *(other.log for other in LOSSES.values() if other.key != key)}
        if loss.log in logs:
            raise PeftMoeError(f"loss {key!r}: the log name {loss.log!r} is taken; set another with log=…")
        LOSSES[key] = loss
        return function

    return add


def _origin(function: LossFn) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', function)}"


def check_loss_names(loss_coefs: Mapping[str, float]) -> None:
    """Check the keys of a config's ``loss_coefs``.

    Raises:
        PeftMoeError: no loss is registered under a name, or the name is a field of the config.
    """
    for name, coefficient in loss_coefs.items():
        if name not in LOSSES:
            raise PeftMoeError(
                f"loss_coefs={dict(loss_coefs)}: {name!r} is not a registered loss; register it with "
                f"peft_moe.register_loss before the config is made.{near_matches(name, LOSSES)}"
            )
        if LOSSES[name].has_field:
            raise PeftMoeError(
                f"loss_coefs={dict(loss_coefs)}: {name!r} is a field of MoLoraConfig; it must be "
                f"set as {name}={coefficient}"
            )


def coefficient_fields() -> tuple[str, ...]:
    """Return the declared config fields that are coefficients of losses on decisions."""
    return tuple(loss.key for loss in LOSSES.values() if loss.has_field)


def active_losses(config: Any) -> list[str]:
    """Return the keys of the losses on decisions whose coefficient is not zero."""
    return [key for key, loss in LOSSES.items() if loss.coefficient(config) != 0]


def loss_options(config: Any) -> dict[str, dict[str, Any]]:
    """Return the keyword arguments that losses take from a config beside their coefficients, by key."""
    return {
        key: {option: getattr(config, name) for option, name in loss.options.items()}
        for key, loss in LOSSES.items()
        if loss.options
    }
