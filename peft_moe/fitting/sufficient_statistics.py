"""What is kept of a router's inputs while they stream by: sums, and a sample of rows; never all of them.

Letters: N rows of features, I in, L labels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Inputs:
    """One router's inputs, as far as a fit needs them.

    Attributes:
        counts: rows per label, [L] float64.
        sums: of the features, per label, [L, I] float64.
        gram: Σ h·hᵀ over all rows, [I, I] float64; None if it was not asked for.
    """

    def __init__(self, in_features: int, labels: int, *, gram: bool, keep: int, seed: int = 0) -> None:
        self.counts = torch.zeros(labels, dtype=torch.float64)
        self.sums = torch.zeros(labels, in_features, dtype=torch.float64)
        self.gram = torch.zeros(in_features, in_features, dtype=torch.float64) if gram else None
        self.keep = keep
        self._draw = np.random.default_rng(seed)
        self._kept_NI: Tensor = torch.empty(0, in_features)
        self._labels_N: Tensor = torch.empty(0, dtype=torch.long)
        self._lots_N: Tensor = torch.empty(0, dtype=torch.float64)

    @staticmethod
    def num_bytes(in_features: int, labels: int, *, gram: bool, keep: int) -> int:
        """What one router's inputs take at most, beside the batch that is being added."""
        sums = labels * (in_features + 1) + (in_features**2 if gram else 0)
        return 8 * sums + keep * (4 * in_features + 16)

    def add(self, features_NI: Tensor, labels_N: Tensor) -> None:
        """Take in some rows; they may live on any device, and the sums move there."""
        self._to(features_NI.device)
        fp32_NI = features_NI.double()
        self.counts += torch.bincount(labels_N, minlength=len(self.counts))
        self.sums.index_add_(0, labels_N, fp32_NI)
        if self.gram is not None:
            self.gram.addmm_(fp32_NI.T, fp32_NI)
        if self.keep:
            self._sample(features_NI, labels_N)

    def _to(self, device: torch.device) -> None:
        if self.sums.device != device:
            self.counts, self.sums = self.counts.to(device), self.sums.to(device)
            self.gram = None if self.gram is None else self.gram.to(device)

    def _sample(self, features_NI: Tensor, labels_N: Tensor) -> None:
        # Each row draws a lot; the lowest ones stay. Hence the same rows whatever the batches are.
        lots_N = torch.from_numpy(self._draw.random(len(labels_N)))
        bound = self._lots_N.max() if len(self._lots_N) >= self.keep else torch.inf
        good_N = lots_N < bound
        here = good_N.to(features_NI.device)
        self._lots_N = torch.cat([self._lots_N, lots_N[good_N]])
        self._kept_NI = torch.cat([self._kept_NI, features_NI[here].float().cpu()])
        self._labels_N = torch.cat([self._labels_N, labels_N[here].cpu()])
        if len(self._lots_N) > self.keep:
            chosen = self._lots_N.topk(self.keep, largest=False).indices.sort().values
            self._lots_N, self._labels_N = self._lots_N[chosen], self._labels_N[chosen]
            self._kept_NI = self._kept_NI[chosen]

    def sample(self) -> tuple[Tensor, Tensor]:
        """At most ``keep`` rows [N, I] float32 and their labels [N], in the order they came."""
        return self._kept_NI, self._labels_N
