"""``fit_router``: a router from labelled prompts, in seconds and without a backward pass.

Letters: I in, M samples, X experts plus the null expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..config import MoLoraConfig
from ..domains import UNKNOWN, domain_columns
from ..errors import PeftMoeError, near_matches
from ..model_router import ModelRouter
from ..routers import Router
from ..routers.learned import LinearScorer
from ..sharing import MODEL_SEAT
from .features import PromptRow, count_labels, prompt_of, stream_features

METHODS = ("logistic",)


@dataclass
class FitReport:
    """What a fit saw.

    Attributes:
        method: how it was fitted.
        samples: rows that were fitted: prompts, or tokens for a router that decides per token.
        per_column: prompts per expert, by name ("null" for the null expert).
        training_accuracy: share of the rows that the fitted router sends where their label says.
    """

    method: str
    samples: int
    per_column: dict[str, int]
    training_accuracy: float


def fit_router(
    model: nn.Module,
    data: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    method: str = "logistic",
    regularisation: float = 1.0,
    batch_size: int = 32,
    adapter_name: str | None = None,
    progress: bool = True,
) -> FitReport:
    """Fit the router of a mixture on prompts with known experts; it can be trained further afterwards.

    The hidden states at the tap are read once, the base running no further than that. "logistic" is
    multinomial logistic regression (scikit-learn) on standardised features, folded into the router's
    own weight and bias.

    Args:
        model: a PeftModel whose active adapter has a linear router of scope "model".
        data: samples with ``prompt`` (text or chat messages) or ``messages``, and ``domain``: an
            expert's name; any other name means "none of them" and needs ``null_expert=True``.
        tokenizer: of the base; its padding is excluded.
        method: "logistic".
        regularisation: weight of the L2 penalty; larger is smoother.
        batch_size: prompts per pass.
        adapter_name: which mixture; default: the active one.
        progress: whether to show a bar.

    Raises:
        PeftMoeError: the model carries no mixture, its router is of another kind, a sample lacks its
            prompt or domain, or an expert has no sample.
    """
    if method not in METHODS:
        raise PeftMoeError(f"method={method!r} is not known.{near_matches(method, METHODS)}")
    adapter, config = _mixture(model, adapter_name)
    inner: nn.Module = model.get_base_model()  # type: ignore[operator]
    seat: ModelRouter = getattr(inner, MODEL_SEAT)
    scorer = _linear_scorer(seat, adapter, config)
    rows = _labelled(data, config)
    counts = count_labels(rows, len(config.routed_names) + bool(config.null_expert))
    _check_counts(counts, config)
    features_MI, labels_M = stream_features(
        inner, seat, adapter, rows, tokenizer, batch_size=batch_size, progress=progress
    )
    weight_XI, bias_X = _logistic(features_MI, labels_M, regularisation)
    with torch.no_grad():
        scorer.weight.copy_(weight_XI)
        scorer.bias.copy_(bias_X)
    chosen_M = (features_MI @ weight_XI.T + bias_X).argmax(-1)
    names = [*config.routed_names, "null"]
    return FitReport(
        method=method,
        samples=len(labels_M),
        per_column=dict(zip(names, counts, strict=False)),
        training_accuracy=float((chosen_M == labels_M).float().mean()),
    )


def _mixture(model: nn.Module, adapter_name: str | None) -> tuple[str, MoLoraConfig]:
    configs: dict[str, Any] = model.peft_config if isinstance(model, PeftModel) else {}  # type: ignore[assignment]
    active = model.active_adapters if isinstance(model, PeftModel) else []
    names = active if adapter_name is None else [adapter_name]
    for name in names:
        if isinstance(configs.get(name), MoLoraConfig):
            return name, configs[name]
    raise PeftMoeError(
        f"{type(model).__name__} carries no mixture named {names}; its adapters are {sorted(configs)}. Pass "
        "a model from get_peft_model(model, MoLoraConfig(…))"
    )


def _linear_scorer(seat: ModelRouter, adapter: str, config: MoLoraConfig) -> LinearScorer:
    routers: dict[str, Router] = dict(seat.molora_router.items())  # type: ignore[arg-type]
    router = routers.get(adapter)
    if router is None or not isinstance(router.scorer, LinearScorer) or not router.trainable:
        raise PeftMoeError(
            f"method='logistic' fits a linear router of scope 'model'; this one is router={config.router!r} "
            f"with router_scope={config.router_scope!r}. Use router='context'"
        )
    if router.settings.num_columns == 1:
        raise PeftMoeError("one expert and no null expert: there is nothing to choose, hence nothing to fit")
    return router.scorer


def _labelled(data: Iterable[Mapping[str, Any]], config: MoLoraConfig) -> list[PromptRow]:
    column_of = domain_columns(config)
    rows = []
    for number, sample in enumerate(data):
        domain = sample.get("domain")
        column = column_of(domain)
        if domain is None:
            raise PeftMoeError(f"sample {number} has no `domain` to name its expert, only {sorted(sample)}")
        if column == UNKNOWN:
            raise PeftMoeError(
                f"domain={domain!r} is no expert.{near_matches(str(domain), config.expert_names)} "
                "Set null_expert=True to let it mean none of them"
            )
        rows.append((prompt_of(sample, whole_text=config.router_granularity == "token"), column))
    return rows


def _check_counts(counts: list[int], config: MoLoraConfig) -> None:
    names = [*config.routed_names, "null"]
    missing = [name for name, count in zip(names, counts, strict=False) if count == 0]
    if missing:
        raise PeftMoeError(
            f"no sample for {missing}: a fit needs prompts of every expert"
            + (", and of no expert (any other domain) for the null expert" if "null" in missing else "")
            + "; add some, or leave the expert out"
        )


def _logistic(features_MI: Tensor, labels_M: Tensor, regularisation: float) -> tuple[Tensor, Tensor]:
    from sklearn.linear_model import LogisticRegression

    mean_I, std_I = features_MI.mean(0), features_MI.std(0)
    # A feature that hardly varies here must not get a huge weight, since it may vary elsewhere.
    std_I = torch.where(std_I > 1e-4 * std_I.max(), std_I, torch.inf)
    model = LogisticRegression(C=1.0 / regularisation, max_iter=1000)
    model.fit(((features_MI - mean_I) / std_I).numpy(), labels_M.numpy())
    weight_XI = torch.from_numpy(model.coef_).float()
    bias_X = torch.from_numpy(model.intercept_).float()
    if len(weight_XI) == 1:  # two classes: scikit-learn keeps the difference of their scores
        weight_XI, bias_X = torch.cat([-weight_XI, weight_XI]) / 2, torch.cat([-bias_X, bias_X]) / 2
    weight_XI = weight_XI / std_I
    return weight_XI, bias_X - weight_XI @ mean_I
