"""How likely an image is: the posterior of a step, the evidence lower bound, and the ODE's density.

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
Gaussians share their variance and each KL is a squared distance of means. `elbo` and
`elbo_of_chain` visit all T levels; `sampled_elbo` estimates both forms from a few; `ode_bound` puts
the probability-flow ODE in the place of all levels above the first.

Terms are in nats per image, summed over dimensions. The equations count t = 1 … T; the functions
take timesteps (t − 1 on discrete schedules, t on flow).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentdiff.diffusion.noise import image_noise, mix
from latentdiff.diffusion.prediction import Denoiser, estimate_at
from latentdiff.diffusion.schedule import NoiseSchedule, Timestep, per_sample
from latentdiff.errors import UserError

#: step -> (B, C, H, W) of independent ±1.
Probes = Callable[[int], Tensor]


def posterior_mean(x_t: Tensor, x_0: Tensor, t: Timestep, schedule: NoiseSchedule) -> Tensor:
    """Mean of q(x_{t−1} | x_t, x_0) as a weighting of the two images.

        μ = [√ᾱ_{t−1} β_t x_0 + √α_t (1 − ᾱ_{t−1}) x_t] / (1 − ᾱ_t)     (Ho et al. 2020, eq. 7)

    Args:    x_t, x_0: (B, C, H, W).  t: (B,) or a number.
    """
    weight_x_0, weight_x_t, _ = schedule.posterior(t - 1, t)
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
    return schedule.posterior(t - 1, t)[2]


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
    denoiser: Denoiser,
    x_0: Tensor,
    schedule: NoiseSchedule,
    noise: Callable[[int], Tensor],
) -> ElboTerms:
    """One-draw estimate of the bound: every level visited once, T denoiser calls.

    Args:    denoiser: (x_t, t (B,)) -> x_0.  x_0: (B, C, H, W).
             noise: timestep -> (B, C, H, W) standard normal.
    """
    first = schedule.clean_timestep + 1

    def estimate(t: int) -> Tensor:
        return estimate_at(denoiser, schedule.q_sample(x_0, noise(t), t), t)

    reconstruction = reconstruction_term(x_0, estimate(first), schedule)
    denoising = torch.zeros_like(reconstruction)
    for t in range(first + 1, schedule.last_timestep + 1):
        denoising = denoising + denoising_term(x_0, estimate(t), t, schedule)
    return ElboTerms(reconstruction, prior_matching_term(x_0, schedule), denoising)


def elbo_of_chain(
    denoiser: Denoiser,
    x_0: Tensor,
    schedule: NoiseSchedule,
    noise: Callable[[int], Tensor],
) -> ElboTerms:
    """One-draw estimate of the bound in the lecture's form, along one forward chain x_1 … x_T.

    Args:    as for `elbo`; noise of every step of the chain.
    """
    first, last = schedule.clean_timestep + 1, schedule.last_timestep
    x_prev, x = x_0, schedule.q_step(x_0, noise(first), first)
    x_0_hat = estimate_at(denoiser, x, first)
    reconstruction = reconstruction_term(x_0, x_0_hat, schedule)
    consistency = torch.zeros_like(reconstruction)
    for t in range(first, last):
        x_next = schedule.q_step(x, noise(t + 1), t + 1)
        x_0_hat = estimate_at(denoiser, x_next, t + 1)
        consistency = consistency + consistency_term(x_prev, x_next, x_0_hat, t, schedule)
        x_prev, x = x, x_next
    return ElboTerms(reconstruction, last_step_term(x_prev, schedule), consistency)


def bits_per_dimension(nats: Tensor, dimensions: int) -> Tensor:
    """A log likelihood in nats per image as bits per dimension; lower is better."""
    return -nats / (dimensions * math.log(2))


@dataclass(frozen=True)
class SampledBound:
    """What `sampled_elbo` found of B images at K levels each."""

    posterior_form: ElboTerms
    """DDPM's form, (B,) nats: KL(q(x_{t−1}|x_t,x_0) ‖ p(x_{t−1}|x_t)) in the sum."""
    lecture_form: ElboTerms
    """The lecture's form, (B,) nats; the same expectation, a larger spread."""
    timesteps: Tensor
    """(B, K) int64, the levels visited."""
    steps: Tensor
    """(B, K) nats, KL_t of each visited level by itself."""
    squared_errors: Tensor
    """(B, K), mean |x_0 − x̂_0|² over dimensions at each visited level."""


def level_probabilities(schedule: NoiseSchedule) -> Tensor:
    """Chances of the levels above the first: half uniform, half by what they are likely to cost.

    The likely cost is that of data N(0, I) under its best denoiser, per dimension
    ½ (SNR_{t−1} − SNR_t)/(1 + SNR_t). Data of that variance with more structure costs less, so no
    KL_t/p_t can tower over the others; the uniform half shows the rest of the curve.
    Returns: (T − 1,) float64 of sum 1, for the timesteps first + 1 … last.
    """
    t = torch.arange(schedule.clean_timestep + 2, schedule.last_timestep + 1)
    cost = (schedule.snr(t - 1) - schedule.snr(t)) / (1 + schedule.snr(t))
    return 0.5 / len(t) + 0.5 * cost / cost.sum()


def draw_levels(offset: Tensor, count: int, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """K levels per image and the weights that make their sum unbiased.

    Args:    offset: (B,) uniform in [0, 1).  count: K.
    Returns: (B, K) int64 timesteps, increasing along K; (B, K) float64 weights 1/(K p_t).
    """
    chance = level_probabilities(schedule)
    teeth = (torch.arange(count) + offset.double()[:, None]) / count
    row = torch.searchsorted(chance.cumsum(0), teeth, right=True).clamp(max=len(chance) - 1)
    return row + schedule.clean_timestep + 2, 1 / (count * chance[row])


def sampled_elbo(
    denoiser: Denoiser,
    x_0: Tensor,
    schedule: NoiseSchedule,
    seeds: Sequence[int],
    levels: int,
) -> SampledBound:
    """Estimate both forms of the bound from `levels` levels of each image and the first one.

    Each image visits K of the T levels, drawn with known probabilities p_t,

        Σ_t KL_t = E[KL_t / p_t]                                 (importance sampling)

    spread over (0, 1) like the teeth of a comb, so that the K draws share one random number. The
    same network call serves both forms: x_{t−2} is drawn from q(x_{t−2} | x_t, x_0).

    Args:    denoiser: (x_t, t (B,)) -> x_0.  x_0: (B, C, H, W).
             seeds: one per image, for its levels and its noise; an image gives the same numbers
             in any batch.  levels: K, 1 … T − 1.
    Raises:  UserError: levels outside this.
    """
    most = schedule.last_timestep - schedule.clean_timestep - 1
    if not 1 <= levels <= most:
        raise UserError(f"the number of levels must lie in 1 … {most}; got {levels}.")

    def noise(number: int) -> Tensor:
        # Drawn in float32, so that float64 images get the same numbers.
        drawn = [image_noise(seed, x_0.shape[1:], number) for seed in seeds]
        return torch.stack(drawn).to(x_0.device, x_0.dtype)

    offset = torch.tensor([mix(seed, -1) / 2**64 for seed in seeds], dtype=torch.float64)
    timesteps, weights = draw_levels(offset, levels, schedule)
    first = schedule.clean_timestep + 1
    x_1 = schedule.q_sample(x_0, noise(0), first)
    reconstruction = reconstruction_term(x_0, estimate_at(denoiser, x_1, first), schedule)
    visits = [
        _visit(denoiser, x_0, timesteps[:, k], (noise(2 * k + 1), noise(2 * k + 2)), schedule)
        for k in range(levels)
    ]
    steps, consistencies, errors = (torch.stack(parts, 1) for parts in zip(*visits, strict=True))
    last = schedule.last_timestep
    before_last = schedule.q_sample(x_0, noise(2 * levels + 1), last - 1)
    weights = weights.to(x_0.dtype).to(x_0.device)
    denoising = (weights * steps).sum(1)
    known = _perfect_consistency(x_0[0].numel(), schedule)
    at_levels = known[timesteps - first - 1].to(x_0.dtype).to(x_0.device)
    consistency = float(known.sum()) + (weights * (consistencies - at_levels)).sum(1)
    return SampledBound(
        ElboTerms(reconstruction, prior_matching_term(x_0, schedule), denoising),
        ElboTerms(reconstruction, last_step_term(before_last, schedule), consistency),
        timesteps,
        steps,
        errors,
    )


def _perfect_consistency(dimensions: int, schedule: NoiseSchedule) -> Tensor:
    """The lecture's term of t − 1 if x̂_0 were x_0, on average: ½ d ln(β̃_t/β_{t−1}).

    Its sum over all levels is known, so only what a term has beyond it is left to sampling.
    Returns: (T − 1,) float64 nats, for the timesteps first + 1 … last.
    """
    t = torch.arange(schedule.clean_timestep + 2, schedule.last_timestep + 1)
    return 0.5 * dimensions * (posterior_variance(t, schedule) / schedule.beta(t - 1)).log()


def _visit(
    denoiser: Denoiser,
    x_0: Tensor,
    t: Tensor,
    noise: tuple[Tensor, Tensor],
    schedule: NoiseSchedule,
) -> tuple[Tensor, Tensor, Tensor]:
    """One level per image: KL_t, the lecture's term of t − 1, mean |x_0 − x̂_0|²; (B,) each."""
    x_t = schedule.q_sample(x_0, noise[0], t)
    x_0_hat = denoiser(x_t, t)
    weight_x_0, weight_x_t, variance = schedule.posterior(t - 2, t)
    mean = per_sample(weight_x_0, x_0) * x_0 + per_sample(weight_x_t, x_t) * x_t
    x_prev = mean + per_sample(variance.sqrt(), x_0) * noise[1]  # of q(x_{t−2} | x_t, x_0)
    return (
        denoising_term(x_0, x_0_hat, t, schedule),
        consistency_term(x_prev, x_t, x_0_hat, t - 1, schedule),
        (x_0 - x_0_hat).square().flatten(1).mean(1),
    )


def angle_grid(schedule: NoiseSchedule, steps: int, start: float | None = None) -> Tensor:
    """Increasing timesteps from `start` to the last, closer together in θ where θ is small.

    √θ grows in equal steps: what is fine in an image is decided at little noise.
    Args:    steps: of the integration, at least 1.  start: None for the first noise level.
    Returns: (steps + 1,) float32.
    """
    start = schedule.clean_timestep + 1 if start is None else start
    if steps < 1:
        raise UserError(f"the number of ODE steps must be at least 1; got {steps}.")
    if not schedule.clean_timestep < start < schedule.last_timestep:
        raise UserError(
            f"the ODE must start at a timestep between {schedule.clean_timestep} (clean, no "
            f"density) and {schedule.last_timestep}; got {start}."
        )
    known = torch.linspace(start, schedule.last_timestep, 8 * schedule.num_train_timesteps + 1)
    angles = _angle(schedule, known).sqrt().numpy()
    wanted = np.linspace(angles[0], angles[-1], steps + 1)
    grid = torch.from_numpy(np.interp(wanted, angles, known.numpy())).float()
    grid[0], grid[-1] = start, schedule.last_timestep
    return grid


def ode_log_likelihood(
    denoiser: Denoiser, x: Tensor, schedule: NoiseSchedule, timesteps: Tensor, probes: Probes
) -> Tensor:
    """ln p_t(x) of a noisy image x at the first of the timesteps, by Heun's second-order steps.

    With θ = arctan(σ/α), r = √(α² + σ²) and z = x_t/r = cos θ x_0 + sin θ ε, the path of the ODE is

        dz/dθ = v(z, θ) = (cos θ z − x̂_0(r z, t)) / sin θ,      d ln p(z)/dθ = −∇·v

    (Song et al. 2021, section 4.3 and appendix D.2, arXiv:2011.13456, in the angle's variable,
    which is regular up to pure noise, where α = 0). r is 1 for variance-preserving schedules. For a
    random sign vector e, E[eᵀ (∂v/∂z) e] = ∇·v (Hutchinson 1990; Grathwohl et al. 2019,
    arXiv:1810.01367).

    Args:    denoiser: (x_t, t (B,)) -> x_0, differentiable in x_t.  x: (B, C, H, W).
             timesteps: increasing, from that of x to the last; see `angle_grid`.
             probes: one per step.
    Returns: (B,) nats, a log density.
    """
    levels = timesteps.tolist()
    angles = _angle(schedule, timesteps).tolist()
    radii = (schedule.alpha(timesteps).square() + schedule.sigma(timesteps).square()).sqrt()
    dimensions, z = x[0].numel(), x / float(radii[0])
    gained = torch.zeros(len(x), dtype=x.dtype, device=x.device)

    def velocity(z: Tensor, i: int, probe: Tensor) -> tuple[Tensor, Tensor]:
        """v, and eᵀ (∂v/∂z) e for each image."""
        cosine, sine, radius = math.cos(angles[i]), math.sin(angles[i]), float(radii[i])
        with torch.enable_grad():
            state = (radius * z).detach().requires_grad_()
            x_0 = estimate_at(denoiser, state, levels[i])
            (gradient,) = torch.autograd.grad((x_0 * probe).sum(), state)
        trace = (gradient * probe).flatten(1).sum(1)
        return (cosine * z - x_0.detach()) / sine, (dimensions * cosine - radius * trace) / sine

    for i in range(len(levels) - 1):
        step, probe = angles[i + 1] - angles[i], probes(i).to(x.device, x.dtype)
        v, divergence = velocity(z, i, probe)
        v_end, divergence_end = velocity(z + step * v, i + 1, probe)
        z = z + step / 2 * (v + v_end)
        gained = gained + step / 2 * (divergence + divergence_end)
    end = -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)
    return end + gained - dimensions * math.log(float(radii[0]))


def ode_bound(
    denoiser: Denoiser,
    x_0: Tensor,
    schedule: NoiseSchedule,
    noise: Tensor,
    probes: Probes,
    steps: int = 50,
) -> Tensor:
    """Lower bound on ln p(x_0) with the ODE in the place of all levels above the first.

        ln p(x_0) ≥ E[ln p(x_0|x_1) + ln p_ODE(x_1) − ln q(x_1|x_0)],    x_1 ~ q(x_1|x_0)

    The decoder N(x̂_0, β_1 I) is that of the evidence lower bound, so the two compare. (Images
    themselves have no density that a finite network knows: at no noise ln p_ODE grows without end.)

    Args:    noise: (B, C, H, W) standard normal, for x_1.  Others: see `ode_log_likelihood`.
    Returns: (B,) nats, a one-draw estimate.
    """
    first = schedule.clean_timestep + 1
    x_1 = schedule.q_sample(x_0, noise, first)
    with torch.no_grad():
        x_0_hat = estimate_at(denoiser, x_1, first)
    log_two_pi_variance = math.log(2 * math.pi * float(schedule.sigma(first)) ** 2)
    log_q = -0.5 * (noise.square() + log_two_pi_variance).flatten(1).sum(1)
    grid = angle_grid(schedule, steps)
    log_p = ode_log_likelihood(denoiser, x_1, schedule, grid, probes)
    return reconstruction_term(x_0, x_0_hat, schedule) + log_p - log_q


def _angle(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """θ = arctan(σ/α), 0 … π/2, float64."""
    return torch.atan2(schedule.sigma(t), schedule.alpha(t))
