"""Solvers from the statistics of a router's inputs to its weights: closed forms and a convex one.

Letters: M rows, I in, X columns (experts plus the null expert).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call

from ..errors import PeftMoeError
from ..routers import Scorer
from ..routers.scorers.learned import LinearScorer
from ..routers.scorers.prototypes import CentroidScorer, PhatgooseScorer
from .sufficient_statistics import InputStatistics

Values = dict[str, Tensor]
"""New values of a scorer's parameters by name."""


def logistic(scorer: Scorer, inputs: InputStatistics, regularisation: float) -> Values:
    """Solve multinomial logistic regression (scikit-learn, L-BFGS) on the sampled rows, standardised.

    Args:
        scorer: a linear scorer.
        inputs: statistics with a sample of rows.
        regularisation: weight of the L2 penalty.

    Raises:
        PeftMoeError: an expert has no row in the sample.
    """
    from sklearn.linear_model import LogisticRegression

    x_MI, labels_M = inputs.sample()
    columns = scorer.settings.num_columns
    if len(torch.unique(labels_M)) < columns:
        raise PeftMoeError(
            f"of {int(inputs.counts.sum())} rows {len(labels_M)} were sampled, and an expert has none among "
            "them; raise max_rows, or give more samples of rare experts"
        )
    mean_I, std_I = x_MI.mean(0), x_MI.std(0)
    # A feature that hardly varies in these rows must not get a huge weight, because it may vary in other
    # texts.
    std_I = torch.where(std_I > 1e-4 * std_I.max(), std_I, torch.inf)
    model = LogisticRegression(C=1.0 / regularisation, max_iter=1000)
    model.fit(((x_MI - mean_I) / std_I).numpy(), labels_M.numpy())
    weight_XI = torch.from_numpy(model.coef_).float()
    bias_X = torch.from_numpy(model.intercept_).float()
    if len(weight_XI) == 1:  # for two classes, scikit-learn returns the difference of their scores
        weight_XI, bias_X = torch.cat([-weight_XI, weight_XI]) / 2, torch.cat([-bias_X, bias_X]) / 2
    weight_XI = weight_XI / std_I
    return {"weight": weight_XI, "bias": bias_X - weight_XI @ mean_I}


def ridge(scorer: Scorer, inputs: InputStatistics, regularisation: float) -> Values:
    """Solve least squares on one-hot labels: W = (HᵀH + λI)⁻¹HᵀY (DUME, arXiv 2603.29765), with a free bias.

    H and Y are centred, which is equivalent to a bias without penalty. λ is ``regularisation`` times the mean
    of the diagonal of the centred HᵀH, so that ``regularisation`` does not depend on the scale of a base's
    features.

    Args:
        scorer: a linear scorer.
        inputs: statistics with the Gram matrix.
        regularisation: relative weight of the L2 penalty.
    """
    assert inputs.gram is not None
    total, mean_I = inputs.counts.sum(), inputs.sums.sum(0) / inputs.counts.sum()
    gram_II = inputs.gram - total * torch.outer(mean_I, mean_I)
    gram_II.diagonal().add_(regularisation * gram_II.diagonal().mean())
    cross_IX = (inputs.sums - inputs.counts[:, None] * mean_I).T
    weight_XI = torch.linalg.solve(gram_II, cross_IX).T
    return {"weight": weight_XI, "bias": inputs.counts / total - weight_XI @ mean_I}


def centroid(scorer: Scorer, inputs: InputStatistics, regularisation: float) -> Values:
    """Return prototypes of unit length: each expert's mean input minus that of its negative examples.

    An expert without negative examples uses the mean over all experts instead. A linear scorer gets the
    prototypes as its weight (plain dot products), a scorer of PHATGOOSE as its vectors.

    Args:
        scorer: a scorer with one weight row per column.
        inputs: statistics of X labels, or of 2·X with negative examples.
        regularisation: not used.
    """
    columns = scorer.settings.num_columns
    means = inputs.sums / inputs.counts[:, None].clamp_min(1)
    origin_I = means[:columns].mean(0)
    prototypes_XI = means[:columns] - origin_I
    if len(means) > columns:
        described = inputs.counts[columns:, None] > 0
        prototypes_XI = torch.where(described, means[:columns] - means[columns:], prototypes_XI)
    prototypes_XI = torch.nn.functional.normalize(prototypes_XI, dim=-1)
    if isinstance(scorer, CentroidScorer):
        return {"weight": prototypes_XI, "origin": origin_I}
    if isinstance(scorer, LinearScorer):
        return {"weight": prototypes_XI, "bias": -prototypes_XI @ origin_I}
    return {"weight": prototypes_XI}


SOLVERS: dict[str, Callable[[Scorer, InputStatistics, float], Values]] = {
    "logistic": logistic,
    "ridge": ridge,
    "centroid": centroid,
}
FILLS: dict[str, tuple[type[Scorer], ...]] = {
    "logistic": (LinearScorer,),
    "ridge": (LinearScorer,),
    "centroid": (CentroidScorer, LinearScorer, PhatgooseScorer),
    "phatgoose": (PhatgooseScorer,),
}
"""The scorers that each method can fill."""
REGULARISATION = {"logistic": 1.0, "ridge": 0.01, "centroid": 0.0}


def accuracy(scorer: Scorer, values: Values, inputs: InputStatistics) -> float:
    """Return the share of sampled rows whose highest score, with these values, is at their label."""
    x_MI, labels_M = inputs.sample()
    columns, missing = scorer.settings.num_columns, list(scorer.settings.missing_columns)
    x_MI, labels_M = x_MI[labels_M < columns], labels_M[labels_M < columns]
    device = next(scorer.parameters()).device
    new = {name: value.to(device, torch.float32) for name, value in values.items()}
    with torch.no_grad():
        scores_MX = functional_call(scorer, new, (x_MI[None].to(device),))[0].cpu()
    scores_MX[:, missing] = -torch.inf
    return float((scores_MX.argmax(-1) == labels_M).double().mean())
