"""The evidence lower bound of pictures from some of its levels, in both of its forms.

The sum over all T levels (`posterior.elbo`) costs T network calls per picture. Here each picture
visits K of them, drawn with known probabilities p_t,

    Σ_t KL_t = E[KL_t / p_t]                                 (importance sampling)

spread over (0, 1) like the teeth of a comb, so that the K draws share one random number. The same
network call serves both forms of the bound: x_{t−2} is drawn from q(x_{t−2} | x_t, x_0).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentdiff.diffusion.broadcast import per_sample
from latentdiff.diffusion.noise import image_noise, mix
from latentdiff.diffusion.posterior import (
    ElboTerms,
    consistency_term,
    denoising_term,
    last_step_term,
    posterior_coefficients,
    posterior_variance,
    prior_matching_term,
    reconstruction_term,
)
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import UserError

Denoiser = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SampledBound:
    """What `sampled_elbo` found of B pictures at K levels each."""

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
    """K levels per picture and the weights that make their sum unbiased.

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
    """Estimate both forms of the bound from `levels` levels of each picture and the first one.

    Args:    denoiser: (x_t, t (B,)) -> x_0.  x_0: (B, C, H, W).
             seeds: one per picture, for its levels and its noise; a picture gives the same numbers
             in any batch.  levels: K, 1 … T − 1.
    Raises:  UserError: levels outside this.
    """
    most = schedule.last_timestep - schedule.clean_timestep - 1
    if not 1 <= levels <= most:
        raise UserError(f"the number of levels must lie in 1 … {most}; got {levels}.")

    def noise(number: int) -> Tensor:
        # Drawn in float32, so that float64 pictures get the same numbers.
        drawn = [image_noise(seed, x_0.shape[1:], number) for seed in seeds]
        return torch.stack(drawn).to(x_0.device, x_0.dtype)

    offset = torch.tensor([mix(seed, -1) / 2**64 for seed in seeds], dtype=torch.float64)
    timesteps, weights = draw_levels(offset, levels, schedule)
    first = schedule.clean_timestep + 1
    x_1 = schedule.q_sample(x_0, noise(0), first)
    reconstruction = reconstruction_term(
        x_0, denoiser(x_1, torch.full((len(x_0),), first)), schedule
    )
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
    """One level per picture: KL_t, the lecture's term of t − 1, mean |x_0 − x̂_0|²; (B,) each."""
    x_t = schedule.q_sample(x_0, noise[0], t)
    x_0_hat = denoiser(x_t, t)
    weight_x_0, weight_x_t, variance = posterior_coefficients(schedule, t - 2, t)
    mean = per_sample(weight_x_0, x_0) * x_0 + per_sample(weight_x_t, x_t) * x_t
    x_prev = mean + per_sample(variance.sqrt(), x_0) * noise[1]  # of q(x_{t−2} | x_t, x_0)
    return (
        denoising_term(x_0, x_0_hat, t, schedule),
        consistency_term(x_prev, x_t, x_0_hat, t - 1, schedule),
        (x_0 - x_0_hat).square().flatten(1).mean(1),
    )
