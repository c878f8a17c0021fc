"""Sufficient statistics of a router's inputs: sums and a random sample of rows, of constant size.

Letters: N rows of features, I in, L labels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class InputStatistics:
    """The statistics of one router's inputs that a fit needs.

    Attributes:
        counts: rows per label, [L] float64.
        sums: sum of the features per label, [L, I] float64.
        gram: Σ h·hᵀ over all rows, [I, I] float64; None without ``gram``.

    Args:
        in_features: I.
        labels: L.
        gram: whether the Gram matrix is needed.
        keep: largest number of rows in the sample.
        seed: of the sample.
    """

    def __init__(self, in_features: int, labels: int, *, gram: bool, keep: int, seed: int = 0) -> None:
        self.counts = torch.zeros(labels, dtype=torch.float64)
        self.sums = torch.zeros(labels, in_features, dtype=torch.float64)
        self.gram = torch.zeros(in_features, in_features, dtype=torch.float64) if gram else None
        self.keep = keep
        self._draw = np.random.default_rng(seed)
        self._rows_NI: Tensor = torch.empty(0, in_features)
        self._labels_N: Tensor = torch.empty(0, dtype=torch.long)
        self._keys_N: Tensor = torch.empty(0, dtype=torch.float64)

    @staticmethod
    def num_bytes(in_features: int, labels: int, *, gram: bool, keep: int) -> int:
        """Return the largest size of one router's statistics, without the batch that is being added."""
        sums = labels * (in_features + 1) + (in_features**2 if gram else 0)
        return 8 * sums + keep * (4 * in_features + 16)

    def add(self, features_NI: Tensor, labels_N: Tensor) -> None:
        """Add rows, which may be on any device; the sums move to that device."""
        self._to(features_NI.device)
        fp64_NI = features_NI.double()
        self.counts += torch.bincount(labels_N, minlength=len(self.counts))
        self.sums.index_add_(0, labels_N, fp64_NI)
        if self.gram is not None:
            self.gram.addmm_(fp64_NI.T, fp64_NI)
        if self.keep:
            self._sample(features_NI, labels_N)

    def _to(self, device: torch.device) -> None:
        if self.sums.device != device:
            self.counts, self.sums = self.counts.to(device), self.sums.to(device)
            self.gram = None if self.gram is None else self.gram.to(device)

    def _sample(self, features_NI: Tensor, labels_N: Tensor) -> None:
        # Every row draws a random key, and the rows with the smallest keys stay: a uniform sample of all
        # rows, which is the same for every batch size.
        keys_N = torch.from_numpy(self._draw.random(len(labels_N)))
        bound = self._keys_N.max() if len(self._keys_N) >= self.keep else torch.inf
        enters_N = keys_N < bound
        on_device_N = enters_N.to(features_NI.device)
        self._keys_N = torch.cat([self._keys_N, keys_N[enters_N]])
        self._rows_NI = torch.cat([self._rows_NI, features_NI[on_device_N].float().cpu()])
        self._labels_N = torch.cat([self._labels_N, labels_N[on_device_N].cpu()])
        if len(self._keys_N) > self.keep:
            chosen = self._keys_N.topk(self.keep, largest=False).indices.sort().values
            self._keys_N, self._labels_N = self._keys_N[chosen], self._labels_N[chosen]
            self._rows_NI = self._rows_NI[chosen]

    def sample(self) -> tuple[Tensor, Tensor]:
        """Return the sampled rows [N, I] float32 and their labels [N], in the order of their arrival."""
        return self._rows_NI, self._labels_N
