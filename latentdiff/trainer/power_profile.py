"""Averages whose length grows with the run, and building one of any length from stored others.

The average of relative length σ_rel weighs the weights θ(τ) of time τ by a power of τ:

    θ̂(t) = ∫₀ᵗ p(τ) θ(τ) dτ,     p(τ) = (γ + 1) τ^γ / t^(γ+1)     (Karras et al. 2024, section 3.1)

σ_rel is the standard deviation of p as a share of t: 0.1 means that about the last tenth of the run
counts. After optimizer step k the average moves by

    θ̂ ← β_k θ̂ + (1 − β_k) θ_k,     β_k = (1 − 1/k)^(γ+1),     k = 1, 2, …       (eq. 127)

which is the integral above exactly when θ(τ) = θ_k for τ in (k − 1, k]: no approximation, and the
first random weights are forgotten at k = 1.

Because averages are linear in θ, a profile that is not stored can be fitted by stored ones, and the
same coefficients then combine the stored weights (their section 3.2).

Source: Karras et al. 2024, Analyzing and Improving the Training Dynamics of Diffusion Models,
arXiv:2312.02696.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from latentdiff.errors import UserError

#: σ_rel at γ = 0, the plain mean of all steps; longer averages do not exist.
LONGEST = 1 / math.sqrt(12)
#: Weight of |coefficient|² in the fit, so that two profiles that are nearly one do no harm.
RIDGE = 1e-12


class Profile(NamedTuple):
    """One average: its exponent and the step at which it was taken."""

    gamma: float
    """γ ≥ 0."""
    step: int
    """t, optimizer steps made."""


def sigma_rel_of(gamma: float) -> float:
    """Relative length of the profile of exponent γ: its standard deviation over its end.

    σ_rel = (γ + 1)^½ (γ + 2)^−1 (γ + 3)^−½                                (eq. 123)
    """
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def gamma_of(sigma_rel: float) -> float:
    """The exponent γ ≥ 0 of a relative length, by bisection.

    Raises: UserError: a length outside 0 … 0.2887 (1/√12, the mean of all steps).
    """
    if not 0 < sigma_rel <= LONGEST:
        raise UserError(
            "an average's relative length (sigma_rel) must lie above 0 and at most at "
            f"{LONGEST:.4f}, which is the mean of all steps; got {sigma_rel}. "
            "0.05 to 0.15 are usual."
        )
    low, high = 0.0, 1 / sigma_rel  # σ_rel < 1/(γ + 2), so γ lies below 1/σ_rel
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sigma_rel_of(middle) > sigma_rel else (low, middle)
    return (low + high) / 2


def decay_of(gamma: float, step: int) -> float:
    """β_k = (1 − 1/k)^(γ+1), the share of the old average that stays at step k = 1, 2, …"""
    return (1 - 1 / step) ** (gamma + 1)


def inner_products(first: Sequence[Profile], second: Sequence[Profile]) -> Tensor:
    """∫ p_i(τ) q_j(τ) dτ for two lists of profiles.

    With t the earlier end of the two and T the later, γ the exponent of the one that ends later:

        (γ_i + 1)(γ_j + 1) / (γ_i + γ_j + 1) · (t/T)^γ / T

    Returns: (len(first), len(second)) float64.
    """
    gamma_i, end_i = _columns(first)
    gamma_j, end_j = _columns(second)
    gamma_i, end_i = gamma_i[:, None], end_i[:, None]
    later = torch.maximum(end_i, end_j)
    of_later = torch.where(end_i < end_j, gamma_j, gamma_i)
    overlap = (torch.minimum(end_i, end_j) / later) ** of_later
    return (gamma_i + 1) * (gamma_j + 1) / (gamma_i + gamma_j + 1) * overlap / later


def fit(stored: Sequence[Profile], wanted: Profile) -> Tensor:
    """Coefficients c with Σ c_i p_i ≈ p in the least-squares sense, and Σ c_i = 1.

    The sum is imposed so that weights that never moved come out exactly. Solved from

        (G + λ I  1) (c)   (b)
        (1ᵀ       0) (μ) = (1),     G_ij = ∫ p_i p_j,   b_i = ∫ p_i p,   λ = RIDGE · max G

    Args:    stored: the profiles at hand, all with step ≥ 1; those after `wanted.step` do not help.
    Returns: (len(stored),) float64.
    """
    gram = inner_products(stored, stored)
    scale = gram.diagonal().max()
    count = len(stored)
    system = torch.ones(count + 1, count + 1, dtype=torch.float64)
    system[:count, :count] = gram / scale + RIDGE * torch.eye(count, dtype=torch.float64)
    system[count, count] = 0
    right = torch.ones(count + 1, 1, dtype=torch.float64)
    right[:count] = inner_products(stored, [wanted]) / scale
    return torch.linalg.solve(system, right)[:count, 0]


def misfit(stored: Sequence[Profile], coefficients: Tensor, wanted: Profile) -> float:
    """‖Σ c_i p_i − p‖ / ‖p‖ in L²: 0 is a perfect fit, above 0.1 the average is another one."""
    gram = inner_products(stored, stored)
    cross = inner_products(stored, [wanted])[:, 0]
    norm = inner_products([wanted], [wanted]).item()
    squared = coefficients @ gram @ coefficients - 2 * (coefficients @ cross) + norm
    return math.sqrt(max(float(squared), 0.0) / norm)


def _columns(profiles: Sequence[Profile]) -> tuple[Tensor, Tensor]:
    rows = torch.tensor([[p.gamma, p.step] for p in profiles], dtype=torch.float64)
    return rows[:, 0], rows[:, 1]
