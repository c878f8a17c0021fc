"""One weight difference as a product of two thin factors: singular values, how many, with what error.

Letters: O out, I in, K singular values kept, S columns of the sketch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import PeftMoeError
from ...io.values import is_bool, is_count, is_positive, optional

# Up to this many rows or columns all singular values are computed; above, only the largest.
EXACT_UP_TO = 512
# Block in which the noise of a large matrix is measured.
NOISE_BLOCK = 768
# ‖ΔWᵀU − VS‖ / ‖S‖ at which randomised factors count as singular; the energy that they miss is its square.
TOLERANCE = 1e-3
MAX_ITERATIONS = 24
# More ranks than any layer has.
_UNLIMITED = 1 << 30
# Elements of a block of rows: what is computed from a whole tensor takes no second one.
_BLOCK = 1 << 18


@dataclass(frozen=True)
class RankRule:
    """How many singular values are kept.

    Attributes:
        rank: exactly so many; None: by ``energy``, or else by Gavish and Donoho's threshold.
        energy: the fewest whose squares sum to this share of ‖ΔW‖².
        max_rank: never more, but for a fixed ``rank``.
        dense: all of ΔW, without decomposition.
    """

    rank: int | None = None
    energy: float | None = None
    max_rank: int = 64
    dense: bool = False

    def __post_init__(self) -> None:
        if not is_bool(self.dense):
            raise PeftMoeError(f"dense={self.dense!r} must be True or False")
        given = [name for name in ("rank", "energy") if getattr(self, name) is not None]
        if self.dense and (given or self.max_rank != type(self).max_rank):
            name = (given or ["max_rank"])[0]
            raise PeftMoeError(
                f"{name}={getattr(self, name)} has no effect with dense=True, which keeps all of each "
                "difference; leave one out"
            )
        for name, value in (("rank", self.rank), ("max_rank", self.max_rank)):
            if not optional(is_count)(value):
                raise PeftMoeError(f"{name}={value!r} must be a whole number ≥ 1")
        if self.rank is not None and self.energy is not None:
            raise PeftMoeError(
                f"rank={self.rank} and energy={self.energy} both choose the rank; give one of them"
            )
        share = self.energy
        if share is not None and not (is_positive(share) and share <= 1):
            raise PeftMoeError(f"energy={self.energy!r} must be a number above 0 and at most 1")

    @property
    def limit(self) -> int:
        """The most that can be kept."""
        if self.dense:
            return _UNLIMITED
        return self.rank if self.rank is not None else self.max_rank

    @property
    def name(self) -> str:
        """Of the rule, for reports."""
        if self.dense:
            return "dense"
        if self.rank is not None:
            return "fixed"
        return "Gavish-Donoho" if self.energy is None else "energy"

    @property
    def described(self) -> dict[str, Any]:
        """For reports: its name and the numbers that it goes by."""
        numbers = {"rank": self.rank, "energy": self.energy, "max_rank": self.max_rank}
        return {"name": self.name, **({} if self.dense else numbers)}


@dataclass
class LowRank:
    """ΔW ≈ B·A.

    Attributes:
        A, B: √S Vᵀ [K, I] and U √S [O, K], float32; K may be 0.
        norm: ‖ΔW‖ (Frobenius).
        energy: share of ‖ΔW‖² that the kept singular values have.
        wanted: rank that the rule asked for, before the limit.
        method: "exact" or "randomised".
        check: ‖ΔWᵀU − VS‖ / ‖S‖ of the randomised factors; 0 where exact.
        noise: threshold below which singular values count as noise; None unless it was asked for.
    """

    A: Tensor
    B: Tensor
    norm: float
    energy: float
    wanted: int
    method: str
    check: float = 0.0
    noise: float | None = None

    @property
    def rank(self) -> int:
        """K."""
        return len(self.A)


def low_rank(delta_OI: Tensor, rule: RankRule, *, seed: int = 0) -> LowRank:
    """The best approximation of ``delta_OI`` that the rule allows.

    Small matrices are decomposed exactly. Large ones by subspace iteration from a random sketch (Halko,
    Martinsson, Tropp, arXiv 0909.4061), until the factors are singular vectors to within ``TOLERANCE``; if
    they do not get there, exactly.

    Args:
        delta_OI: ΔW, float32, finite.
        rule: how many singular values to keep.
        seed: of the sketch.
    """
    norm = frobenius(delta_OI)
    smaller, limit = min(delta_OI.shape), min(rule.limit, *delta_OI.shape)
    if norm == 0.0:
        return _cut(delta_OI, delta_OI[:, :0], norm, delta_OI[:0].sum(1), delta_OI[:0], 0, 0, "exact")
    if rule.dense:
        return _whole(delta_OI, norm)
    generator = torch.Generator(delta_OI.device).manual_seed(seed)
    if smaller > EXACT_UP_TO and 4 * limit < smaller:
        noise = _noise_threshold(delta_OI, generator) if rule.name == "Gavish-Donoho" else None
        found = _randomised(delta_OI, rule, norm, noise, generator)
        if found is not None:
            return found
    U_OK, S_K, V_KI = torch.linalg.svd(delta_OI, full_matrices=False)
    noise = None
    if rule.name == "Gavish-Donoho":
        noise = threshold(S_K, delta_OI.shape, tuple(delta_OI.shape))
    wanted = _wanted(S_K, rule, norm, noise)
    return _cut(delta_OI, U_OK, norm, S_K, V_KI, wanted, min(wanted, limit), "exact", noise=noise)


def _whole(delta_OI: Tensor, norm: float) -> LowRank:
    """ΔW times an identity on its shorter side: a product of two factors that is ΔW to the bit."""
    outputs, inputs = delta_OI.shape
    one = torch.eye(min(outputs, inputs), device=delta_OI.device)
    A, B = (delta_OI, one) if outputs <= inputs else (one, delta_OI)
    return LowRank(A.contiguous(), B.contiguous(), norm, 1.0, min(outputs, inputs), "dense")


def relative_error(delta_OI: Tensor, A_KI: Tensor, B_OK: Tensor, norm: float) -> float:
    """‖ΔW − B·A‖ / ‖ΔW‖ of the factors as they are written, block of rows by block."""
    if norm == 0.0:
        return 0.0
    A_KI, squares, start = A_KI.float(), 0.0, 0
    for rows in row_blocks(delta_OI):
        factors = B_OK[start : start + len(rows)].float()
        squares += frobenius(torch.addmm(rows, factors, A_KI, alpha=-1)) ** 2
        start += len(rows)
    return math.sqrt(squares) / norm


def frobenius(matrix: Tensor) -> float:
    """‖·‖, block by block: no copy of the whole."""
    return math.sqrt(sum(float(torch.linalg.vector_norm(block)) ** 2 for block in row_blocks(matrix)))


def row_blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    """``tensor`` in blocks of whole rows, views of about a megabyte in float32."""
    if not tensor.dim():
        return (tensor,)
    return tensor.split(max(1, _BLOCK * len(tensor) // max(1, tensor.numel())))  # type: ignore[no-untyped-call]  # untyped, torch's


def threshold(S: Tensor, block: tuple[int, ...], shape: tuple[int, ...]) -> float:
    """Gavish and Donoho's threshold for singular values under unknown noise (arXiv 1305.5870).

    Noise is measured by the median singular value, which a low-rank signal hardly moves. In a bf16 model it
    is the rounding of the weights: without this cut a LoRA of rank 16 that was merged reads as rank 134.

    Args:
        S: all singular values of ``block`` rows and columns of the matrix, or of the whole.
        block: their shape.
        shape: of the whole matrix. τ = λ(β)·√n·σ with n = max(shape); for the whole matrix this is
            2.858·median where it is square.
    """
    median = float(S.median())
    per_entry = median / math.sqrt(max(block) * marchenko_pastur_median(min(block) / max(block)))
    beta = min(shape) / max(shape)
    factor = math.sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + math.sqrt(beta**2 + 14 * beta + 1)))
    return factor * math.sqrt(max(shape)) * per_entry


def marchenko_pastur_median(beta: float) -> float:
    """Median eigenvalue of XXᵀ/n for white noise of unit variance; ``beta`` rows per column, at most 1."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    # t = mid + half·cos θ takes the square roots at both ends of the density away.
    theta = torch.linspace(math.pi, 0, 20_001, dtype=torch.float64)
    t = (low + high) / 2 + (high - low) / 2 * theta.cos()
    mass = torch.cumulative_trapezoid(theta.sin() ** 2 / t.clamp_min(1e-12), -theta)
    return float(t[1:][mass >= mass[-1] / 2][0])


def _noise_threshold(delta_OI: Tensor, generator: torch.Generator) -> float:
    """The threshold from a block of rows and columns drawn at random: all singular values cost too much."""
    rows, columns = (
        torch.randperm(size, generator=generator, device=delta_OI.device)[:NOISE_BLOCK].sort().values
        for size in delta_OI.shape
    )
    block = delta_OI[rows][:, columns] if len(rows) <= len(columns) else delta_OI[:, columns][rows]
    return threshold(torch.linalg.svdvals(block), tuple(block.shape), tuple(delta_OI.shape))


def _wanted(S_K: Tensor, rule: RankRule, norm: float, noise: float | None) -> int:
    """Rank by the rule, among the singular values at hand; one more than there are if they do not suffice."""
    if rule.rank is not None:
        return rule.rank
    if rule.energy is not None:
        shares = S_K.double().square().cumsum(0) / norm**2
        # The last bits of a full sum are rounding: all of the energy is reached at 1 − 1e-6.
        reached = (shares >= min(rule.energy, 1 - 1e-6)).nonzero()
        return int(reached[0]) + 1 if len(reached) else len(S_K) + 1
    assert noise is not None
    cut = max(noise, _rounding(S_K, norm))
    return int((cut < S_K).sum())


def _rounding(S_K: Tensor, norm: float) -> float:
    """Below this, singular values are rounding of float32 arithmetic, not of the weights."""
    largest = float(S_K[0]) if len(S_K) else norm
    return torch.finfo(torch.float32).eps * 32 * largest


def _randomised(
    delta_OI: Tensor, rule: RankRule, norm: float, noise: float | None, generator: torch.Generator
) -> LowRank | None:
    outputs, inputs = delta_OI.shape
    limit = min(rule.limit, outputs, inputs)
    columns = min(2 * limit + 8, outputs, inputs)
    sketch = torch.randn(outputs, columns, generator=generator, device=delta_OI.device)
    G_IS = delta_OI.T @ sketch
    for _ in range(MAX_ITERATIONS):
        Z_IS = torch.linalg.qr(G_IS).Q
        # (ΔW·Z) = U S Wᵀ, hence ΔW·V = U·S exactly with V = Z·W.
        Q_OS, R_SS = torch.linalg.qr(delta_OI @ Z_IS)
        U_SS, S_S, W_SS = torch.linalg.svd(R_SS)
        U_OS, V_IS = Q_OS @ U_SS, Z_IS @ W_SS.T
        G_IS = delta_OI.T @ U_OS
        wanted = _wanted(S_S[:limit], rule, norm, noise)
        rank = min(wanted, limit)
        judged = max(rank, 1)  # that nothing is above the noise must be as sure as that something is
        misfit = torch.linalg.vector_norm(G_IS[:, :judged] - V_IS[:, :judged] * S_S[:judged])
        check = float(misfit / torch.linalg.vector_norm(S_S[:judged]))
        if check <= TOLERANCE:
            return _cut(
                delta_OI, U_OS, norm, S_S, V_IS.T, wanted, rank, "randomised", check=check, noise=noise
            )
    return None


def _cut(
    delta_OI: Tensor,
    U_OK: Tensor,
    norm: float,
    S_K: Tensor,
    V_KI: Tensor,
    wanted: int,
    rank: int,
    method: str,
    *,
    check: float = 0.0,
    noise: float | None = None,
) -> LowRank:
    """Both factors take the roots of the singular values, so that neither dwarfs the other in 16 bits."""
    root_K = S_K[:rank].sqrt()
    energy = float(S_K[:rank].double().square().sum()) / norm**2 if norm else 1.0
    A_KI = (root_K[:, None] * V_KI[:rank]).contiguous()
    B_OK = (U_OK[:, :rank] * root_K).contiguous()
    return LowRank(A_KI, B_OK, norm, min(energy, 1.0), wanted, method, check, noise)
