"""Scorers that compare the input with a prototype of each expert: from examples, or from its weights.

Letters: B batch, T sequence, I in, O out, R total rank, X columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..scorer import Scorer, register_router
from ..settings import RouterSettings

# Below every score of an expert that is there; finite, so that nothing downstream turns into NaN.
_ABSENT = -1.0e4
# Under the root of a prototype's norm: prototypes of zero score 0, and their gradient stays finite.
_TINY = 1e-6


@register_router("centroid")
class CentroidScorer(Scorer):
    """Cosine with the mean input of each expert's examples, as seen from an origin: z = cos(x − o, c).

    What mergekit (arXiv 2403.13257) does in its ``gate_mode: hidden`` with the mean hidden states of
    positive minus negative prompts. Hidden states share a large common part, which would make all cosines
    alike; the origin takes it out. ``fit_router(method="centroid")`` fills both; zero prototypes score
    all experts alike.
    The null expert has a prototype of its own.
    """

    paper = "arXiv 2403.13257"

    def __init__(self, settings: RouterSettings, in_features: int) -> None:
        super().__init__(settings, in_features)
        self.weight = nn.Parameter(torch.empty(settings.num_columns, in_features, dtype=torch.float32))
        self.origin = nn.Parameter(torch.zeros(in_features, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Prototypes normal with standard deviation ``init_std``; the origin at zero."""
        nn.init.normal_(self.weight, std=self.settings.init_std)
        nn.init.zeros_(self.origin)

    def forward(self, x: Tensor) -> Tensor:
        weight_XI = self.weight.to(x.dtype)
        unit_XI = weight_XI * (weight_XI.square().sum(-1, keepdim=True) + _TINY).rsqrt()
        return functional.linear(functional.normalize(x - self.origin.to(x.dtype), dim=-1), unit_XI)


@register_router("phatgoose")
class PhatgooseScorer(Scorer):
    """z = LN(x)·LN(v)/√I with one vector per expert, trained for it alone (Muqeeth et al., arXiv 2402.05859).

    LN has no weights. ``fit_router(method="phatgoose")`` trains each v as a gate σ(v·x) on its expert,
    on that expert's own samples. Nobody trains a vector of the null expert: it stays zero, which scores
    0, as an expert does whose vector has nothing to do with the input.
    """

    paper = "arXiv 2402.05859"

    def __init__(self, settings: RouterSettings, in_features: int) -> None:
        super().__init__(settings, in_features)
        self.weight = nn.Parameter(torch.empty(settings.num_columns, in_features, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with standard deviation ``init_std``."""
        nn.init.normal_(self.weight, std=self.settings.init_std)

    def forward(self, x: Tensor) -> Tensor:
        shape = (self.in_features,)
        unit_XI = functional.layer_norm(self.weight.to(x.dtype), shape)
        return functional.linear(functional.layer_norm(x, shape), unit_XI) / self.in_features**0.5


class _FromExperts(Scorer):
    """What scorers made from the experts' weights share: rows of columns, and who is absent.

    An expert that does not adapt the layer scores lowest. The null expert scores 0: what an expert scores
    that moves nothing.
    """

    reads_experts = True
    trainable = False

    def _all_columns(self, scores_BTX: Tensor, present_X: Tensor) -> Tensor:
        """Scores of the routed experts to scores of all columns."""
        scores_BTX = scores_BTX.masked_fill(~present_X, _ABSENT)
        return functional.pad(scores_BTX, (0, int(self.settings.null_expert)))


@register_router("arrow")
class ArrowScorer(_FromExperts):
    """z = |v·x|, v the direction that an expert amplifies most (Ostapenko et al., arXiv 2405.11157).

    v is the top right singular vector of B·A. No cosine: scores grow with ‖x‖, unless
    ``router_input_norm``.
    """

    paper = "arXiv 2405.11157"

    def __init__(self, settings: RouterSettings, in_features: int) -> None:
        super().__init__(settings, in_features)
        self.weight = nn.Parameter(torch.zeros(len(settings.routed), in_features, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        scores_BTX = functional.linear(x, self.weight.to(x.dtype)).abs()
        return self._all_columns(scores_BTX, (self.weight != 0).any(-1))

    def read_experts(
        self, A_RI: Tensor, B_RO: Tensor, ranks: tuple[int, ...], scaling: tuple[float, ...]
    ) -> None:
        """Directions of all routed experts; of zero where one is absent, or moves nothing."""
        A_e, B_e = torch.split(A_RI.detach(), list(ranks)), torch.split(B_RO.detach(), list(ranks))
        with torch.no_grad():
            for row, expert in enumerate(self.settings.routed):
                self.weight[row] = top_direction(A_e[expert].double(), B_e[expert].double())


@register_router("spectr")
class SpectrScorer(_FromExperts):
    """z = ‖ΔW·x‖, how much an expert would move the input (Fleshman & Van Durme, arXiv 2504.03454).

    It keeps one factor C with ‖C·x‖ = ‖s·B·A·x‖, of the experts' ranks: as large as all of A, in float32,
    and as many operations per token. Experts with a large ‖ΔW‖ win for every input; "spectr_unit"
    divides by it.
    """

    paper = "arXiv 2504.03454"

    def __init__(self, settings: RouterSettings, in_features: int) -> None:
        super().__init__(settings, in_features)
        self.expect_experts((0,) * settings.num_experts)

    def expect_experts(self, ranks: tuple[int, ...]) -> None:
        """Make room for the factors of experts of these ranks."""
        self.ranks = tuple(ranks[expert] for expert in self.settings.routed)
        self.weight = nn.Parameter(torch.zeros(sum(self.ranks), self.in_features, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(functional.linear(x, self.weight.to(x.dtype)), list(self.ranks), dim=-1)
        scores_BTX = torch.stack([torch.linalg.vector_norm(part, dim=-1) for part in parts], dim=-1)
        present = torch.tensor([rank > 0 for rank in self.ranks], device=x.device)
        return self._all_columns(scores_BTX, present)

    def read_experts(
        self, A_RI: Tensor, B_RO: Tensor, ranks: tuple[int, ...], scaling: tuple[float, ...]
    ) -> None:
        """The factors of all routed experts."""
        A_e, B_e = torch.split(A_RI.detach(), list(ranks)), torch.split(B_RO.detach(), list(ranks))
        factors = [
            self._scaled(short_factor(scaling[e] * A_e[e].double(), B_e[e].double()))
            for e in self.settings.routed
        ]
        with torch.no_grad():
            self.weight.copy_(torch.cat(factors))

    def _scaled(self, factor_RI: Tensor) -> Tensor:
        return factor_RI


@register_router("spectr_unit")
class SpectrUnitScorer(SpectrScorer):
    """SpectR with every expert at unit Frobenius norm: z = ‖ΔW·x‖ / ‖ΔW‖."""

    def _scaled(self, factor_RI: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(factor_RI)  # of C, hence of ΔW
        return factor_RI / norm if norm > 0 else factor_RI


def top_direction(A_RI: Tensor, B_RO: Tensor) -> Tensor:
    """Top right singular vector of Bᵀ·A without forming it, [I]; zero where the product is zero.

    With Aᵀ = QR the product is (BᵀRᵀ)Qᵀ, so that its right singular vectors are Q times eigenvectors of
    R(BBᵀ)Rᵀ, of the rank's size. Its sign is chosen: the largest entry is positive.

    Args:
        A_RI, B_RO: one expert's factors, float64.
    """
    if not len(A_RI):
        return A_RI.new_zeros(A_RI.shape[1])
    Q_IR, R_RR = torch.linalg.qr(A_RI.T)
    values, vectors = torch.linalg.eigh(R_RR @ (B_RO @ B_RO.T) @ R_RR.T)
    if values[-1] <= 0:
        return A_RI.new_zeros(A_RI.shape[1])
    top_I = Q_IR @ vectors[:, -1]
    return top_I * top_I[top_I.abs().argmax()].sign()


def short_factor(A_RI: Tensor, B_RO: Tensor) -> Tensor:
    """C [R, I] with ‖C·x‖ = ‖Bᵀ·A·x‖ for every x: with B = QR transposed, C = R·A.

    Args:
        A_RI, B_RO: one expert's factors, float64.
    """
    if not len(A_RI):
        return A_RI
    factor_RI = torch.linalg.qr(B_RO.T, mode="r").R @ A_RI
    # More ranks than outputs leave rows over.
    return functional.pad(factor_RI, (0, 0, 0, len(A_RI) - len(factor_RI)))
