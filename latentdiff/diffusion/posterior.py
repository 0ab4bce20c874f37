"""q(x_{t−1} | x_t, x_0) and the evidence lower bound built from it.

    ln p(x_0) ≥  E[ln p(x_0|x_1)]                                     reconstruction
               − KL(q(x_T|x_0) ‖ p(x_T))                              prior matching
               − Σ_{t=2…T} E[KL(q(x_{t−1}|x_t,x_0) ‖ p(x_{t−1}|x_t))]   denoising (consistency)

(Ho et al. 2020, eq. 5.) The lecture derives it first with the steps the other way round,

    ln p(x_0) ≥  E[ln p(x_0|x_1)] − E[KL(q(x_T|x_{T−1}) ‖ p(x_T))]
               − Σ_{t=1…T−1} E[ln q(x_t|x_{t−1}) − ln p(x_t|x_{t+1})]        consistency

(Luo 2022, eq. 45, arXiv:2208.11970). There the summand is printed as KL(q(x_t|x_{t−1}) ‖
p(x_t|x_{t+1})); for the bound to hold, x_t must be averaged as in the chain, over
q(x_t | x_{t−1}, x_{t+1}). Both forms have the same expectation.

The reverse step p(x_{t−1}|x_t) is the posterior with the network's x̂_0 in the place of x_0, so both
Gaussians share their variance and each KL is a squared distance of means. Terms are in nats per
image, summed over dimensions. The equations count t = 1 … T; the functions take timesteps (t − 1 on
discrete schedules, t on flow).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from latentdiff.diffusion.broadcast import per_sample
from latentdiff.diffusion.schedule import NoiseSchedule, Timestep


def posterior_coefficients(
    schedule: NoiseSchedule, s: Timestep, t: Timestep
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of x_0 and x_t in the mean of q(x_s | x_t, x_0), and its variance, for s before t.

        mean = (α_s β/σ_t²) x_0 + (r σ_s²/σ_t²) x_t,   variance = β σ_s²/σ_t²

    where q(x_t | x_s) = N(r x_s, β I); with s = t−1 this is Ho et al. 2020, eq. 6-7.
    Returns: (weight of x_0, weight of x_t, variance), float64 of t's shape.
    """
    scale, beta = schedule.transition(s, t)
    noise_s, noise_t = schedule.sigma(s).square(), schedule.sigma(t).square()
    return schedule.alpha(s) * beta / noise_t, scale * noise_s / noise_t, beta * noise_s / noise_t


def posterior_mean(x_t: Tensor, x_0: Tensor, t: Timestep, schedule: NoiseSchedule) -> Tensor:
    """Mean of q(x_{t−1} | x_t, x_0) as a weighting of the two images.

        μ = [√ᾱ_{t−1} β_t x_0 + √α_t (1 − ᾱ_{t−1}) x_t] / (1 − ᾱ_t)     (Ho et al. 2020, eq. 7)

    Args:    x_t, x_0: (B, C, H, W).  t: (B,) or a number.
    """
    weight_x_0, weight_x_t, _ = posterior_coefficients(schedule, t - 1, t)
    return per_sample(weight_x_0, x_0) * x_0 + per_sample(weight_x_t, x_t) * x_t


def posterior_mean_from_eps(
    x_t: Tensor, eps: Tensor, t: Timestep, schedule: NoiseSchedule
) -> Tensor:
    """The same mean, written with the noise in x_t.

        μ = (1/√α_t) (x_t − (1 − α_t)/√(1 − ᾱ_t) ε)               (Ho et al. 2020, eq. 11)

    Here α_t is the lecture's one-step α_t = 1 − β_t. Not finite where α_t = 0: at zero terminal
    SNR the noise does not tell x_0.

    Args:    x_t, eps: (B, C, H, W).  t: (B,) or a number.
    """
    scale, beta = schedule.transition(t - 1, t)
    noise_weight = per_sample(beta / schedule.sigma(t), eps)
    return (x_t - noise_weight * eps) / per_sample(scale, x_t)


def posterior_variance(t: Timestep, schedule: NoiseSchedule) -> Tensor:
    """Variance of q(x_{t−1} | x_t, x_0), 0 at the first level.

    β̃_t = (1 − ᾱ_{t−1})/(1 − ᾱ_t) β_t                        (Ho et al. 2020, eq. 7)
    """
    return posterior_coefficients(schedule, t - 1, t)[2]


def reconstruction_term(x_0: Tensor, x_0_hat: Tensor, schedule: NoiseSchedule) -> Tensor:
    """ln p(x_0 | x_1) with x̂_0 estimated from x_1, the first noise level.

    The posterior's variance is 0 there, so the decoder N(x̂_0, β_1 I) has one of its own.
    Args:    x_0, x_0_hat: (B, C, H, W).
    Returns: (B,) nats, a log density.
    """
    variance = float(schedule.beta(schedule.clean_timestep + 1))
    squared = (x_0 - x_0_hat).square() / variance
    return -0.5 * (squared + math.log(2 * math.pi * variance)).flatten(1).sum(1)


def prior_matching_term(x_0: Tensor, schedule: NoiseSchedule) -> Tensor:
    """KL(q(x_T | x_0) ‖ N(0, I)): what x_T still tells of x_0; holds no parameter to train.

    Args:    x_0: (B, C, H, W).
    Returns: (B,) nats ≥ 0; exactly 0 when the schedule ends in pure noise.
    """
    mean = float(schedule.alpha(schedule.last_timestep)) * x_0
    variance = float(schedule.sigma(schedule.last_timestep)) ** 2
    return 0.5 * (mean.square() + variance - 1 - math.log(variance)).flatten(1).sum(1)


def denoising_term(x_0: Tensor, x_0_hat: Tensor, t: Timestep, schedule: NoiseSchedule) -> Tensor:
    """KL(q(x_{t−1}|x_t,x_0) ‖ p(x_{t−1}|x_t)) for timesteps above the first level.

        = ½ (SNR_{t−1} − SNR_t) |x_0 − x̂_0|²                   (Kingma et al. 2021, eq. 13-15)

    Args:    x_0, x_0_hat: (B, C, H, W), the estimate made from x_t.  t: (B,) or a number.
    Returns: (B,) nats ≥ 0.
    """
    gain = per_sample(schedule.snr(t - 1) - schedule.snr(t), x_0)
    return (0.5 * gain * (x_0 - x_0_hat).square()).flatten(1).sum(1)


def last_step_term(x_prev: Tensor, schedule: NoiseSchedule) -> Tensor:
    """KL(q(x_T | x_{T−1}) ‖ N(0, I)): prior matching in the lecture's form.

    Not 0 where one step adds little noise, which the consistency terms make up for.
    Args:    x_prev: (B, C, H, W), x_{T−1}.
    Returns: (B,) nats ≥ 0.
    """
    last = schedule.last_timestep
    scale, beta = map(float, schedule.transition(last - 1, last))
    return 0.5 * ((scale * x_prev).square() + beta - 1 - math.log(beta)).flatten(1).sum(1)


def consistency_term(
    x_prev: Tensor, x_next: Tensor, x_0_hat: Tensor, t: Timestep, schedule: NoiseSchedule
) -> Tensor:
    """The lecture's step: how far from x_{t−1} and back from x_{t+1} differ about x_t.

        E[ln q(x_t|x_{t−1}) − ln p(x_t|x_{t+1})]  over  x_t ~ q(x_t | x_{t−1}, x_{t+1}) = N(m, w I)
        = ½ [d ln(β̃/β_t) + d w (1/β̃ − 1/β_t) + |m − μ|²/β̃ − |m − √α_t x_{t−1}|²/β_t]

    with μ, β̃ the mean and variance of p(x_t | x_{t+1}), and by Bayes' rule
    1/w = 1/β_t + α_{t+1}/β_{t+1},   m = w (√α_t x_{t−1}/β_t + √α_{t+1} x_{t+1}/β_{t+1}).

    Args:    x_prev, x_next: (B, C, H, W), x_{t−1} and x_{t+1} of one forward chain.
             x_0_hat: (B, C, H, W), the estimate made from x_next.  t: (B,) or a number, below the
             last timestep.
    Returns: (B,) nats, of either sign.
    """
    (scale, beta), (scale_up, beta_up) = (
        schedule.transition(t - 1, t),
        schedule.transition(t, t + 1),
    )
    w = 1 / (1 / beta + scale_up.square() / beta_up)
    variance = posterior_variance(t + 1, schedule)
    forward = per_sample(scale, x_prev) * x_prev
    m = per_sample(w / beta, x_prev) * forward + per_sample(w * scale_up / beta_up, x_next) * x_next
    back = posterior_mean(x_next, x_0_hat, t + 1, schedule)
    constant = (variance / beta).log() + w * (1 / variance - 1 / beta)
    squares = (m - back).square() / per_sample(variance, m)
    squares = squares - (m - forward).square() / per_sample(beta, m)
    return 0.5 * (squares + per_sample(constant, m)).flatten(1).sum(1)


class ElboTerms(NamedTuple):
    """The three terms of the bound for each image, (B,) nats."""

    reconstruction: Tensor
    prior_matching: Tensor
    denoising: Tensor
    """Or, in the lecture's form, consistency."""

    @property
    def total(self) -> Tensor:
        """The lower bound on ln p(x_0), a log density."""
        return self.reconstruction - self.prior_matching - self.denoising


def elbo(
    denoiser: Callable[[Tensor, Tensor], Tensor],
    x_0: Tensor,
    schedule: NoiseSchedule,
    noise: Callable[[int], Tensor],
) -> ElboTerms:
    """One-draw estimate of the bound: every level visited once, T denoiser calls.

    Args:    denoiser: (x_t, t (B,)) -> x_0.  x_0: (B, C, H, W).
             noise: timestep -> (B, C, H, W) standard normal.
    """
    first = schedule.clean_timestep + 1
    reconstruction = torch.zeros(len(x_0))
    denoising = torch.zeros(len(x_0), dtype=x_0.dtype, device=x_0.device)
    for timestep in range(first, schedule.last_timestep + 1):
        x_t = schedule.q_sample(x_0, noise(timestep), timestep)
        x_0_hat = denoiser(x_t, torch.full((len(x_0),), timestep))
        if timestep == first:
            reconstruction = reconstruction_term(x_0, x_0_hat, schedule)
        else:
            denoising = denoising + denoising_term(x_0, x_0_hat, timestep, schedule)
    return ElboTerms(reconstruction, prior_matching_term(x_0, schedule), denoising)


def elbo_of_chain(
    denoiser: Callable[[Tensor, Tensor], Tensor],
    x_0: Tensor,
    schedule: NoiseSchedule,
    noise: Callable[[int], Tensor],
) -> ElboTerms:
    """One-draw estimate of the bound in the lecture's form, along one forward chain x_1 … x_T.

    Args:    as for `elbo`; noise of every step of the chain.
    """
    first, last = schedule.clean_timestep + 1, schedule.last_timestep
    x_prev, x = x_0, schedule.q_step(x_0, noise(first), first)
    x_0_hat = denoiser(x, torch.full((len(x_0),), first))
    reconstruction = reconstruction_term(x_0, x_0_hat, schedule)
    consistency = torch.zeros_like(reconstruction)
    for t in range(first, last):
        x_next = schedule.q_step(x, noise(t + 1), t + 1)
        x_0_hat = denoiser(x_next, torch.full((len(x_0),), t + 1))
        consistency = consistency + consistency_term(x_prev, x_next, x_0_hat, t, schedule)
        x_prev, x = x, x_next
    return ElboTerms(reconstruction, last_step_term(x_prev, schedule), consistency)


def bits_per_dimension(nats: Tensor, dimensions: int) -> Tensor:
    """A log likelihood in nats per image as bits per dimension; lower is better."""
    return -nats / (dimensions * math.log(2))
