"""What a mixture's routers are as the gates of a native MoE: one matrix, softmax, the k largest.

Letters: H hidden size, E experts, X columns (routed experts, and the null expert).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import PeftMoeError
from ...routers import Router, RouterSettings
from ...tuner.layers.shared_router import BLOCK_ROUTER
from ..mixture_tensors import PREFIX, Mixture

# Of these only the product with a matrix, and a bias, is left outside of training.
_LINEAR = ("linear", "gate", "random", "noisy_linear")
_BIAS = 1e-6  # of logits: below it a float32 softmax does not see the difference


@dataclass(frozen=True)
class Gate:
    """One network's gate.

    Attributes:
        weight: [X, H], float32, a row per column, in the mixture's order, the null expert's last.
        reason: why it is not the router; None where it is.
    """

    weight: Tensor | None
    reason: str | None = None


def gate_of(mixture: Mixture, home: str, hidden: int) -> Gate:
    """The gate of the feed-forward network ``home``.

    Args:
        mixture: with ``mixing="block"``.
        home: name of the network's module.
        hidden: H.
    """
    config, settings = mixture.config, mixture.config.router_settings()
    refused = _settings_reason(mixture, settings)
    if refused is not None:
        return Gate(None, refused)
    prefix = f"{PREFIX}{home}.{BLOCK_ROUTER}.molora_router."
    stored = {n.removeprefix(prefix): mixture.read(n).cpu() for n in mixture.names if n.startswith(prefix)}
    moved = stored.get("balance_bias")
    if moved is not None and bool((moved != moved[0]).any()):
        return Gate(None, "its balancing bias joins the choice of experts, which such a gate has not")
    if not config.scorer.reads_input:
        return _constant(mixture, home, hidden, settings, stored)
    weight_XH = stored.get("scorer.weight")
    if weight_XH is None or tuple(weight_XH.shape) != (settings.num_columns, hidden):
        raise PeftMoeError(f"{mixture.label}: the router of {home} cannot be read; copy the folder again")
    bias_X = stored.get("scorer.bias", torch.zeros(settings.num_columns)).float() / settings.temperature
    scaled_XH = weight_XH.float() / settings.temperature
    if float(bias_X.max() - bias_X.min()) > _BIAS:
        reason = (
            "its scores have a bias per expert, and such a gate has none (router='gate' is the same without)"
        )
        return Gate(scaled_XH, reason)
    return Gate(scaled_XH)


def _settings_reason(mixture: Mixture, settings: RouterSettings) -> str | None:
    config = mixture.config
    if config.scorer.reads_input and settings.scorer not in _LINEAR:
        return f"router={config.router!r} is no linear map of the network's input"
    if config.scorer.reads_input and config.router_scope == "model":
        return "router_scope='model' decides once for all layers, such a model in every layer"
    if config.scorer.reads_input and settings.granularity != "token":
        return f"router_granularity={settings.granularity!r} decides for more than the token at hand"
    if config.scorer.reads_input and settings.input_norm:
        return "router_input_norm divides what the router reads by its size, which is no linear map"
    if config.scorer.reads_input and settings.scoring_func != "softmax":
        return f"scoring_func={settings.scoring_func!r} is no softmax"
    return None


def _constant(
    mixture: Mixture, home: str, hidden: int, settings: RouterSettings, stored: dict[str, Tensor]
) -> Gate:
    """Equal gates are a matrix of zeros; others would need a bias."""
    if mixture.config.router_scope == "model":
        prefix = mixture._router_prefix(home)
        stored = {n.removeprefix(prefix): mixture.read(n) for n in mixture.names if n.startswith(prefix)}
    router = Router(settings, hidden)
    try:
        router.load_state_dict(stored)
    except RuntimeError as error:
        raise PeftMoeError(f"{mixture.label}: the router of {home} cannot be read ({error})") from error
    with torch.no_grad():
        gates_E = router.eval()(torch.zeros(1, 1, hidden)).gates.reshape(-1).double()
    routed_E = gates_E[list(settings.routed)]
    if settings.num_columns and bool(((routed_E - 1 / settings.num_columns).abs() < 1e-6).all()):
        return Gate(torch.zeros(settings.num_columns, hidden))
    return Gate(None, "its constant gates are not equal parts of 1, and scores of such a gate have no bias")
