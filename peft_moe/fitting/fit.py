"""``fit_router``: fits a mixture's routers to texts with known experts, in seconds.

In every scope, each router is fitted on its own inputs: one hidden state per prompt, or one per token of
prompt and completion. The texts are read once, or once per group of routers if memory is short. Only sums
over their hidden states remain, and a random sample of them.

- "logistic": multinomial logistic regression (scikit-learn) on standardised features, for linear routers.
- "ridge": least squares on one-hot labels (DUME, arXiv 2603.29765), for linear routers.
- "centroid": each expert's mean input (mergekit), for centroid, linear and PHATGOOSE routers.
- "phatgoose": one gate per expert, trained with that expert alone by the language model's loss (arXiv
  2402.05859), for PHATGOOSE routers. This is the only method with gradients.
- "arrow": reads no texts; routers that are made from the experts' weights are made again from the present
ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..errors import PeftMoeError, near_matches
from ..routers import PRESETS, Router
from ..tuner.config.mixture import MoLoraConfig
from ..tuner.layers.linear import MoLoraLayer
from ..tuner.layers.shared_router import named_routers
from .phatgoose import train_vectors
from .router_inputs import INPUTS, InputReader
from .samples import Prompts, described_rows, labelled_rows
from .solvers import FILLS, REGULARISATION, SOLVERS
from .streaming import StreamSettings, fit_streamed
from .token_rows import TokenRows

METHODS = (*SOLVERS, "phatgoose", "arrow")
# Sampled rows per router for the reported accuracy, if the method itself needs no sample.
_ACCURACY_ROWS = 512


@dataclass
class FitReport:
    """The result of a fit.

    Attributes:
        method: the method of the fit.
        samples: rows that one router was fitted on: prompts, or tokens if it decides per token.
        per_column: number of texts per expert, by name ("null" for the null expert).
        training_accuracy: share of sampled rows whose highest score is at their label, the mean over routers.
        kept: sampled rows per router; all rows unless ``max_rows`` is smaller.
        accuracies: the share for each router, by name.
        passes: number of times that the texts were read.
        losses: for "phatgoose", each expert's mean loss at the start and at the end, by name.
    """

    method: str
    samples: int
    per_column: dict[str, int]
    training_accuracy: float
    kept: int = 0
    accuracies: dict[str, float] = field(default_factory=dict)
    passes: int = 0
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)


def fit_router(
    model: nn.Module,
    data: Iterable[Mapping[str, Any]] = (),
    tokenizer: Any = None,
    *,
    method: str | None = None,
    prompts: Prompts | None = None,
    regularisation: float | None = None,
    inputs: str = "own",
    batch_size: int = 32,
    max_rows: int = 20_000,
    max_gigabytes: float = 4.0,
    steps: int = 100,
    learning_rate: float = 5e-3,
    seed: int = 0,
    adapter_name: str | None = None,
    progress: bool = True,
) -> FitReport:
    """Fit a mixture's routers to texts with known experts; they can be trained further afterwards.

    Args:
        model: a PeftModel with a mixture.
        data: samples with ``prompt`` (text or chat messages), ``messages``, or ``text`` (not for decisions
            per prompt), and ``domain``, which is an expert's name. Any other name means the null expert and
            needs ``null_expert=True``. Routers that decide per token also read a ``completion``.
        tokenizer: of the base.
        method: "logistic", "ridge", "centroid", "phatgoose" or "arrow", see above; None takes the preset's.
        prompts: for "centroid", instead of data: ``{"math": {"positive": [...], "negative": [...]}}``.
        regularisation: weight of the L2 penalty. The default is 1 for "logistic" and 0.01 for "ridge".
        inputs: for routers per module or block, the experts that are active in the layers below: "own" (each
            text's own expert, as if all routers below decided correctly) or "base" (none). An expert changes
            the hidden states above it in its own way: with "own", higher routers follow the lowest one.
        batch_size: texts per call.
        max_rows: sampled rows per router for "logistic".
        max_gigabytes: largest memory of the statistics of one pass; a single router may exceed it.
        steps, learning_rate: of "phatgoose", per expert.
        seed: of all draws.
        adapter_name: the mixture's name; None takes the active one.
        progress: whether to show bars.

    Raises:
        PeftMoeError: the model has no mixture, the method cannot fill its router, a sample lacks its prompt
            or domain, or an expert has no sample.
    """
    adapter, config = _mixture(model, adapter_name)
    method = _method(method, inputs, config)
    if method == "arrow":
        return _read_experts(model, adapter, config)
    keep = max_rows if method == "logistic" else min(max_rows, _ACCURACY_ROWS)
    max_bytes = int(max_gigabytes * 1e9)
    settings = StreamSettings(method == "ridge", keep, seed, max_bytes, batch_size, progress)
    strength = REGULARISATION.get(method, 0.0) if regularisation is None else regularisation
    job = _Job(model, adapter, config, method, settings, inputs, strength, steps, learning_rate)
    return job.run(data, prompts, tokenizer)


@dataclass
class _Job:
    """One call of :func:`fit_router` with checked arguments and resolved defaults."""

    model: nn.Module
    adapter: str
    config: MoLoraConfig
    method: str
    settings: StreamSettings
    inputs: str
    strength: float
    steps: int
    learning_rate: float

    def run(self, data: Iterable[Mapping[str, Any]], prompts: Prompts | None, tokenizer: Any) -> FitReport:
        """Read the texts, solve for all routers, and only then write their weights."""
        inner: nn.Module = self.model.get_base_model()  # type: ignore[operator]
        routers = dict(named_routers(inner, self.adapter))
        _check_routers(routers, self.method, self.config)
        _check_runs(self.model, self.adapter, self.config, self.method)
        columns = next(iter(routers.values())).settings.num_columns
        rows, counts = _rows(data, prompts, self.config, tokenizer, self.method, columns)
        losses = {}
        if self.method == "phatgoose":
            how = {"steps": self.steps, "learning_rate": self.learning_rate}
            losses = train_vectors(inner, self.config, routers, rows, self.settings, **how)  # type: ignore[arg-type]
        reader = InputReader(inner, self.adapter, self.config, self.inputs)
        fitted = fit_streamed(reader, routers, rows, self.settings, SOLVERS.get(self.method), self.strength)
        with torch.no_grad():
            for name, router in routers.items():
                for key, value in fitted.values[name].items():
                    router.scorer.get_parameter(key).copy_(value)
        return FitReport(
            method=self.method,
            samples=fitted.samples,
            per_column=counts,
            training_accuracy=sum(fitted.accuracies.values()) / len(routers),
            kept=fitted.kept,
            accuracies=fitted.accuracies,
            passes=fitted.passes,
            losses=losses,
        )


def _method(method: str | None, inputs: str, config: MoLoraConfig) -> str:
    method = method or (PRESETS[config.router].fit if config.router in PRESETS else None) or "logistic"
    if method not in METHODS:
        raise PeftMoeError(f"method={method!r} is not known.{near_matches(method, METHODS)}")
    if inputs not in INPUTS:
        raise PeftMoeError(f"inputs={inputs!r} is not known.{near_matches(inputs, INPUTS)}")
    return method


def _mixture(model: nn.Module, adapter_name: str | None) -> tuple[str, MoLoraConfig]:
    configs: dict[str, Any] = model.peft_config if isinstance(model, PeftModel) else {}
    active = model.active_adapters if isinstance(model, PeftModel) else []
    names = active if adapter_name is None else [adapter_name]
    for name in names:
        if isinstance(configs.get(name), MoLoraConfig):
            return name, configs[name]
    raise PeftMoeError(
        f"{type(model).__name__} carries no mixture named {names}; its adapters are {sorted(configs)}. Pass "
        "a model from get_peft_model(model, MoLoraConfig(…))"
    )


def _check_routers(routers: Mapping[str, Router], method: str, config: MoLoraConfig) -> None:
    scorers = [router.scorer for router in routers.values()]
    if not scorers or not all(isinstance(s, FILLS[method]) and s.trainable for s in scorers):
        fits = {name for name, kinds in FILLS.items() if issubclass(config.scorer, kinds)}
        other = f"; it can be fitted by {sorted(fits)}" if fits and config.scorer.trainable else ""
        kinds = " or ".join(kind.__name__.removesuffix("Scorer").lower() for kind in FILLS[method])
        raise PeftMoeError(
            f"method={method!r} fits a {kinds} router; this one is router={config.router!r}{other}. Use a "
            f"preset that {method!r} fits, or another method"
        )
    if scorers[0].settings.num_columns == 1:
        raise PeftMoeError(
            "one expert and no null expert: there is nothing to choose and therefore nothing to fit"
        )


def _check_runs(model: nn.Module, adapter: str, config: MoLoraConfig, method: str) -> None:
    # A probe runs the bare base alone; all other reading runs the mixture itself.
    probes = config.router_scope == "model" and config.router_below_tap != "prompt"
    inner: nn.Module = model.get_base_model()  # type: ignore[operator]
    active: list[str] = model.active_adapters  # type: ignore[assignment]
    if active != [adapter] and not (probes and method != "phatgoose"):
        raise PeftMoeError(
            f"adapter {adapter!r} is to be fitted, but the active adapters are {active}; call "
            f"set_adapter({adapter!r}) first"
        )
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise PeftMoeError(
            f"{type(inner).__name__} is an encoder-decoder, whose layers see different texts; fit_router "
            "serves decoders and encoders"
        )


def _rows(
    data: Iterable[Mapping[str, Any]],
    prompts: Prompts | None,
    config: MoLoraConfig,
    tokenizer: Any,
    method: str,
    columns: int,
) -> tuple[TokenRows, dict[str, int]]:
    if tokenizer is None:
        raise PeftMoeError(f"method={method!r} reads texts; give the base's tokenizer as third argument")
    if prompts is not None and method != "centroid":
        raise PeftMoeError(f"prompts describe experts for method='centroid', not for {method!r}; give data")
    if prompts is None:
        completions = method == "phatgoose" or config.router_granularity != "sequence"
        rows = labelled_rows(data, config, tokenizer, completions=completions)
    else:
        rows = described_rows(prompts, config, tokenizer, columns)
    by_label = Counter(rows.labels)
    counts = [by_label[column] for column in range(columns)]
    names = [*config.routed_names, "null"][:columns]
    missing = [name for name, count in zip(names, counts, strict=True) if count == 0]
    if missing and not (method == "phatgoose" and missing == ["null"]):
        raise PeftMoeError(
            f"no sample for {missing}: a fit needs prompts of every expert"
            + (", and of no expert (any other domain) for the null expert" if "null" in missing else "")
            + "; add some, or leave the expert out"
        )
    return rows, dict(zip(names, counts, strict=True))


def _read_experts(model: nn.Module, adapter: str, config: MoLoraConfig) -> FitReport:
    if not config.scorer.reads_experts:
        raise PeftMoeError(
            f"method='arrow' fills routers that are made from the experts' weights; router={config.router!r} "
            "is not, use router='arrow' or 'spectr'"
        )
    for layer in model.modules():
        if isinstance(layer, MoLoraLayer) and adapter in layer.molora_router:
            router: Router = layer.molora_router[adapter]  # type: ignore[assignment]
            A, B, ranks = layer.molora_A[adapter], layer.molora_B[adapter], layer.mixtures[adapter].rank_map
            router.scorer.read_experts(A.weight, B.weight, ranks.ranks, ranks.scaling)  # type: ignore[arg-type]
    return FitReport("arrow", 0, {}, float("nan"))
