"""q(x_s | x_t, x_0) and the evidence lower bound built from it."""

from __future__ import annotations

from torch import Tensor

from latentdiff.diffusion.schedule import NoiseSchedule, Timestep


def posterior_coefficients(
    schedule: NoiseSchedule, s: Timestep, t: Timestep
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of x_0 and x_t in the mean of q(x_s | x_t, x_0), and its variance.

        mean = (α_s β/σ_t²) x_0 + (r σ_s²/σ_t²) x_t,   variance = β σ_s²/σ_t²

    where q(x_t | x_s) = N(r x_s, β I); with s = t−1 this is Ho et al. 2020, eq. 6-7.
    Returns: (weight of x_0, weight of x_t, variance), float64 of t's shape.
    """
    scale, beta = schedule.transition(s, t)
    noise_s, noise_t = schedule.sigma(s).square(), schedule.sigma(t).square()
    return schedule.alpha(s) * beta / noise_t, scale * noise_s / noise_t, beta * noise_s / noise_t
