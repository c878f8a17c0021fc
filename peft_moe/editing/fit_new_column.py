"""A new expert's router rows from labelled texts, while all other rows stay as they are.

Letters: M rows of features, I in, X columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import PeftMoeError
from ..fitting.router_inputs import InputReader
from ..fitting.samples import labelled_rows
from ..fitting.solvers import FILLS, Values
from ..fitting.streaming import StreamSettings, fit_streamed
from ..fitting.sufficient_statistics import InputStatistics
from ..fitting.token_rows import TokenRows
from ..routers import Router, Scorer
from ..routers.scorers.learned import LinearScorer
from ..routers.scorers.prototypes import CentroidScorer
from ..tuner.config.mixture import MoLoraConfig
from ..tuner.layers.shared_router import named_routers
from .mixture import LiveMixture

_KEEP, _MEMORY = 20_000, 4_000_000_000
_STRENGTH = 1.0  # of the L2 penalty on standardised features, as in fit_router(method="logistic")


@dataclass(frozen=True)
class RowFit:
    """Texts for the rows of one expert, checked before the mixture is touched."""

    rows: TokenRows
    column: int
    init: str
    batch_size: int
    progress: bool

    def run(self, mixture: LiveMixture) -> None:
        """Read the texts through the edited model, and write the rows."""
        routers = dict(named_routers(mixture.inner, mixture.adapter))
        settings = StreamSettings(False, _KEEP, 0, _MEMORY, self.batch_size, self.progress)
        reader = InputReader(mixture.inner, mixture.adapter, mixture.config, "own")
        solve = partial(_SOLVERS[self.init], self.column)
        fitted = fit_streamed(reader, routers, self.rows, settings, solve, _STRENGTH)
        with torch.no_grad():
            for name, router in routers.items():
                for key, value in fitted.values[name].items():
                    router.scorer.get_parameter(key).copy_(value)


def row_fit(
    init: str,
    name: str,
    config: MoLoraConfig,
    router: Router,
    data: Iterable[Mapping[str, Any]] | None,
    tokenizer: Any,
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> RowFit | None:
    """Texts and solver for ``init``; None where it needs neither.

    Raises:
        PeftMoeError: no data, none of the new expert or of the others, or a router of another kind.
    """
    if init not in _SOLVERS:
        if data is not None and init != "refit":
            raise PeftMoeError(f"data has no effect with init={init!r}; choose 'centroid', 'fit' or 'refit'")
        if init == "refit" and (data is None or tokenizer is None):
            raise PeftMoeError("init='refit' fits all rows from texts; give data and tokenizer")
        return None
    kinds = FILLS["centroid"] if init == "centroid" else FILLS["logistic"]
    if not isinstance(router.scorer, kinds) or not router.scorer.trainable:
        raise PeftMoeError(
            f"init={init!r} cannot fill a row of router={config.router!r}; leave init out, or fit all "
            "rows with init='refit'"
        )
    if data is None or tokenizer is None:
        raise PeftMoeError(f"init={init!r} reads texts; give data (samples with a `domain`) and tokenizer")
    rows = labelled_rows(data, config, tokenizer, completions=config.router_granularity != "sequence")
    column = config.routed_names.index(name)
    own = sum(label == column for label in rows.labels)
    alone = isinstance(router.scorer, CentroidScorer)
    if not own or (own == len(rows) and not alone):
        lacking = f"of {name!r}" if not own else f"of any other domain than {name!r}, to tell it from"
        raise PeftMoeError(f"init={init!r}: data has no sample {lacking}; add some")
    return RowFit(rows, column, init, batch_size, progress)


def _centroid_row(column: int, scorer: Scorer, inputs: InputStatistics, strength: float) -> Values:
    """Mean input of the new expert, seen from the router's origin; a linear row also from the other texts.

    A linear row has the others' mean length, and its bias puts the border midway between the new texts and
    the others, in the difference of the scores.
    """
    means = inputs.sums / inputs.counts[:, None].clamp_min(1)
    if isinstance(scorer, CentroidScorer):
        origin_I = scorer.origin.detach().to(means)
        return _with_row(scorer, column, weight=functional.normalize(means[column] - origin_I, dim=-1))
    others = [c for c in range(scorer.settings.num_columns) if c != column]
    seen = [c for c in others if inputs.counts[c] > 0]
    direction_I = functional.normalize(means[column] - means[seen].mean(0), dim=-1)
    if not isinstance(scorer, LinearScorer):
        return _with_row(scorer, column, weight=direction_I)
    lengths = scorer.weight.detach()[others].double().norm(dim=-1)
    row_I = direction_I * (lengths.mean() if lengths.max() > 0 else 1.0).to(direction_I)  # type: ignore[union-attr]
    x_MI, labels_M, rest_MX = _rows_of(scorer, inputs, others)
    ahead_M = x_MI @ row_I.cpu() - rest_MX.max(-1).values
    new_M = labels_M == column
    border = (ahead_M[new_M].mean() + ahead_M[~new_M].mean()) / 2
    return _with_row(scorer, column, weight=row_I, bias=-border)


def _fitted_row(column: int, scorer: Scorer, inputs: InputStatistics, strength: float) -> Values:
    """The row of least cross-entropy beside the others' scores: a convex problem, solved by L-BFGS."""
    assert isinstance(scorer, LinearScorer)
    others = [c for c in range(scorer.settings.num_columns) if c != column]
    x_MI, labels_M, rest_MX = _rows_of(scorer, inputs, others)
    mean_I, std_I = x_MI.mean(0), x_MI.std(0)
    std_I = torch.where(std_I > 1e-4 * std_I.max(), std_I, torch.inf)
    z_MI, new_M = (x_MI - mean_I) / std_I, labels_M == column
    # What of the cross-entropy depends on the row: log(Σ others + own) less the label's own score.
    rest_M = rest_MX.logsumexp(-1)
    row_I = torch.zeros(x_MI.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([row_I, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        own_M = z_MI @ row_I + bias
        total = (torch.logaddexp(rest_M, own_M) - torch.where(new_M, own_M, 0.0)).sum()
        total = total + 0.5 * strength * row_I.square().sum()
        total.backward()  # type: ignore[no-untyped-call]  # torch's own
        return total

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]  # untyped, torch's
    weight_I = row_I.detach() / std_I
    return _with_row(scorer, column, weight=weight_I, bias=bias.detach() - weight_I @ mean_I)


def _with_row(scorer: Scorer, column: int, **row: Tensor) -> Values:
    """Parameters that differ in one column only."""
    values = {}
    for name, value in row.items():
        values[name] = scorer.get_parameter(name).detach().clone()
        values[name][column] = value.to(values[name])
    return values


def _rows_of(
    scorer: LinearScorer, inputs: InputStatistics, others: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Kept features [M, I], labels [M] and the other columns' scores [M, X-1], float64 on the CPU."""
    x_MI, labels_M = inputs.sample()
    x_MI = x_MI.double()
    absent = set(scorer.settings.missing_columns)
    here = [c for c in others if c not in absent]
    weight_XI, bias_X = scorer.weight.detach().double().cpu(), scorer.bias.detach().double().cpu()
    rest_MX = x_MI @ weight_XI[here].T + bias_X[here]
    return x_MI, labels_M, rest_MX


_SOLVERS = {"centroid": _centroid_row, "fit": _fitted_row}
