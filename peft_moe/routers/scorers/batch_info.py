"""Scorers that read the call instead of hidden states: the right label, a task's skills, the token itself.

Letters: B batch, T sequence, X columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...errors import PeftMoeError
from ...routing.context import RoutingContext
from ..scorer import Scorer, register_router
from ..settings import RouterSettings

# exp(-1e4) is 0 in every float: the gates are exactly one-hot.
_NEVER = -1.0e4
# A large odd constant of Knuth's multiplicative hashing; the ids are spread before the remainder is taken.
_SPREAD = 2654435761


def _domains(context: RoutingContext | None, name: str) -> Tensor:
    if context is None or context.domains is None:
        raise PeftMoeError(
            f"router={name!r} needs to be told each sequence's domain, also when it generates: run inside "
            "routing_inputs(domains=…), or train with a `domain` column"
        )
    domains = context.domains
    # One per sequence serves all of its tokens.
    return domains[:, None] if domains.dim() == 1 else domains


@register_router("oracle")
class OracleScorer(Scorer):
    """The label decides: the expert of the sequence's domain alone; unknown domains (-1) mix all alike."""

    reads_hidden = False
    trainable = False
    paper = "arXiv 2202.13914"

    def forward(self, x: Tensor) -> Tensor:
        """All scores equal: what a call without labels would get if it were not refused."""
        return x.new_zeros(*x.shape[:-1], self.settings.num_columns)

    def score(self, x: Tensor, context: RoutingContext | None) -> Tensor:
        domains_BT1 = _domains(context, "oracle").to(x.device)[..., None]
        columns_X = torch.arange(self.settings.num_columns, device=x.device)
        wrong_BTX = (domains_BT1 != columns_X) & (domains_BT1 >= 0)
        return torch.where(wrong_BTX, _NEVER, 0.0).to(x.dtype)


@register_router("poly")
class PolyScorer(Scorer):
    """One learnt row of skills per task: sigmoid(Φ[task]) (Ponti et al., arXiv 2202.13914).

    The tasks are the columns' domains; the mean row serves unknown ones. In training logistic noise makes
    the gates those of a relaxed Bernoulli variable.
    """

    reads_hidden = False
    paper = "arXiv 2202.13914"

    def __init__(self, settings: RouterSettings, in_features: int) -> None:
        super().__init__(settings, in_features)
        columns = settings.num_columns
        self.weight = nn.Parameter(torch.empty(columns, columns, dtype=torch.float32).uniform_(-1e-3, 1e-3))

    def forward(self, x: Tensor) -> Tensor:
        """Scores of an unknown task."""
        return self.weight.mean(0).to(x.dtype).expand(*x.shape[:-1], -1)

    def score(self, x: Tensor, context: RoutingContext | None) -> Tensor:
        domains_BT = _domains(context, "poly").to(x.device)
        known_BTX = self.weight[domains_BT.clamp_min(0)]
        scores_BTX = torch.where((domains_BT >= 0)[..., None], known_BTX, self.weight.mean(0))
        if self.training:
            uniform_BTX = torch.rand_like(scores_BTX).clamp(1e-6, 1 - 1e-6)
            scores_BTX = scores_BTX + torch.logit(uniform_BTX)
        return scores_BTX.to(x.dtype)


@register_router("hash")
class HashScorer(Scorer):
    """The token's id decides, by a fixed hash (Roller et al., arXiv 2106.04426): balanced, and blind."""

    reads_hidden = False
    trainable = False
    paper = "arXiv 2106.04426"

    def __init__(self, settings: RouterSettings, in_features: int) -> None:
        super().__init__(settings, in_features)

    def forward(self, x: Tensor) -> Tensor:
        """All scores equal: what a call without token ids would get if it were not refused."""
        return x.new_zeros(*x.shape[:-1], self.settings.num_columns)

    def score(self, x: Tensor, context: RoutingContext | None) -> Tensor:
        if context is None or context.input_ids is None:
            raise PeftMoeError(
                "router='hash' reads token ids, and this call gives none (inputs_embeds?); pass input_ids"
            )
        spread_BT = (context.input_ids.to(x.device) * _SPREAD) % 2**32 // 2**8
        column_BT1 = (spread_BT % self.settings.num_columns)[..., None]
        scores_BTX = x.new_full((*column_BT1.shape[:-1], self.settings.num_columns), _NEVER)
        return scores_BTX.scatter(-1, column_BT1, 0.0)
