"""Distances between sets of features, and what can be said of nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def frechet_distance(ours: Tensor, theirs: Tensor) -> float:
    """Distance of two Gaussians fitted to features (N, D) and (M, D).

        |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½)

    The trace of the root is the sum of the singular values of C₁ᵀ C₂, with Σ = C Cᵀ and C the
    centred features over √(N − 1); no matrix root of a singular Σ is needed.

    Source: Heusel et al. 2017, eq. 6, arXiv:1706.08500.
    """
    first, second = ours.double(), theirs.double()
    shift = first.mean(0) - second.mean(0)
    a = (first - first.mean(0)) / max(1, len(first) - 1) ** 0.5
    b = (second - second.mean(0)) / max(1, len(second) - 1) ** 0.5
    root = torch.linalg.svdvals(a @ b.T).sum()
    return float(shift.square().sum() + a.square().sum() + b.square().sum() - 2 * root)


def kernel_distance(ours: Tensor, theirs: Tensor) -> float:
    """Unbiased squared MMD with the kernel (x·y/D + 1)³; 0 on average for one distribution.

    Source: Bińkowski et al. 2018, arXiv:1801.01401 (KID).
    """
    first, second = ours.double(), theirs.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        values = kernel(x, x)
        return (values.sum() - values.diagonal().sum()) / (len(x) * (len(x) - 1))

    return float(within(first) + within(second) - 2 * kernel(first, second).mean())


def rbf_distance(ours: Tensor, theirs: Tensor, sigma: float = 10.0) -> float:
    """CMMD: squared MMD with a Gaussian kernel on unit vectors, times 1000.

    Source: Jayasumana et al. 2024, arXiv:2401.09603 (σ = 10, scale 1000, biased estimate).
    """
    first, second = F.normalize(ours.double(), dim=1), F.normalize(theirs.double(), dim=1)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (-torch.cdist(x, y).square() / (2 * sigma**2)).exp().mean()

    return 1000 * float(kernel(first, first) + kernel(second, second) - 2 * kernel(first, second))


def ranks(queries: Tensor, gallery: Tensor, own: Sequence[int]) -> list[int]:
    """Rank of each query's own picture among the gallery by cosine; 0 is the nearest.

    Args: queries: (N, D).  gallery: (M, D).  own: the gallery row of each query.
    """
    scores = F.normalize(queries.double(), dim=1) @ F.normalize(gallery.double(), dim=1).T
    mine = scores[torch.arange(len(own)), list(own)][:, None]
    found: list[int] = (scores > mine).sum(1).tolist()
    return found


def share_within(found: Sequence[int], top: int) -> float:
    """Share of ranks that are among the first `top`."""
    return sum(rank < top for rank in found) / len(found)


def nearest_distance(queries: Tensor, gallery: Tensor) -> Tensor:
    """Cosine distance 1 − cos of each query to its nearest row of the gallery, (N,)."""
    scores = F.normalize(queries.double(), dim=1) @ F.normalize(gallery.double(), dim=1).T
    return 1 - scores.max(1).values


def fit_classifier(features: Tensor, labels: Tensor, classes: int, ridge: float = 1e-2) -> Tensor:
    """Least-squares classifier on standardised features.

    Args:    features: (N, D).  labels: (N,) int64.
    Returns: (D + 1, classes) for `classify`; standardisation is folded in.
    """
    x = features.double()
    mean, spread = x.mean(0), x.std(0) + 1e-6
    scaled = torch.cat([(x - mean) / spread, torch.ones(len(x), 1, dtype=torch.double)], 1)
    wanted = F.one_hot(labels, classes).double()
    penalty = ridge * len(x) * torch.eye(scaled.shape[1], dtype=torch.double)
    solved = torch.linalg.solve(scaled.T @ scaled + penalty, scaled.T @ wanted)
    weights = solved[:-1] / spread[:, None]
    return torch.cat([weights, (solved[-1] - mean @ weights)[None]])


def classify(features: Tensor, classifier: Tensor) -> Tensor:
    """Return the most likely class of each row, (N,) int64."""
    return (features.double() @ classifier[:-1] + classifier[-1]).argmax(1)
