"""Euler, Euler ancestral and Heun: one-step solvers of the probability-flow ODE.

For variance-preserving schedules the ODE is straight in x̂ = x/α against the noise ratio r = σ/α,

    dx̂/dr = ε(x)                              (Karras et al. 2022, eq. 1, arXiv:2206.00364)

and for rectified flow in x itself against σ: dx/dσ = ε − x_0 (Liu et al. 2022, arXiv:2209.03003).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from latentdiff.diffusion.samplers.walk import (
    Denoiser,
    Level,
    Noise,
    SamplerState,
    Timesteps,
    advance,
    ancestral_variance,
    check_fraction,
    estimate_at,
    walk,
)
from latentdiff.diffusion.schedule import NoiseSchedule


def frame(point: Level, is_flow: bool) -> tuple[float, float]:
    """(scale, time) of the straight ODE: it is written in x/scale against time."""
    return (1.0, point.sigma) if is_flow else (point.alpha, point.ratio)


def slope(x: Tensor, x_0: Tensor, point: Level, is_flow: bool) -> Tensor:
    """The right-hand side of the straight ODE."""
    eps = (x - point.alpha * x_0) / point.sigma
    return eps - x_0 if is_flow else eps


def euler(
    denoiser: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    noise: Noise,
    *,
    final_timestep: float | None = None,
    after: SamplerState | None = None,
) -> Iterator[SamplerState]:
    """Euler's method; in these coordinates it is DDIM with η = 0, step for step.

    Args:    as for `ddpm`; noise is never asked.
    Source:  Karras et al. 2022, Algorithm 1 without its correction, arXiv:2206.00364.
    """
    x = x_T
    for step in walk(schedule, timesteps, final_timestep, after):
        x_0 = estimate_at(denoiser, x, step.now.t)
        x = advance(x, x_0, step.now, step.next)
        yield SamplerState(step.number, step.now.t, x, x_0)


def euler_ancestral(
    denoiser: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    noise: Noise,
    *,
    eta: float = 1.0,
    final_timestep: float | None = None,
    after: SamplerState | None = None,
) -> Iterator[SamplerState]:
    """Euler down to a level below the next, then noise up to it.

    With eta = 1 it draws from q(x_s | x_t, x_0), so it is DDPM in other coordinates.

    Args:    as for `ddpm`.  eta: 0 (Euler) … 1, the share of the noise's standard deviation.
    """
    check_fraction("eta", eta)
    x = x_T
    for step in walk(schedule, timesteps, final_timestep, after):
        x_0 = estimate_at(denoiser, x, step.now.t)
        variance = eta**2 * ancestral_variance(step.now, step.next)
        x = advance(x, x_0, step.now, step.next, variance, partial(noise, step.number))
        yield SamplerState(step.number, step.now.t, x, x_0)


def heun(
    denoiser: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    noise: Noise,
    *,
    final_timestep: float | None = None,
    after: SamplerState | None = None,
) -> Iterator[SamplerState]:
    """Heun's second-order method: the mean of the slopes at both ends; two evaluations a step.

    One evaluation, and Euler, where an end has no slope: to the clean image, and from pure noise
    on variance-preserving schedules.

    Args:    as for `ddpm`; noise is never asked.
    Source:  Karras et al. 2022, Algorithm 1, arXiv:2206.00364.
    """
    x, flow = x_T, schedule.is_flow
    for step in walk(schedule, timesteps, final_timestep, after):
        now, to = step.now, step.next
        x_0 = estimate_at(denoiser, x, now.t)
        trial = advance(x, x_0, now, to)
        if to.is_clean or (now.is_pure_noise and not flow):
            x = trial
        else:
            trial_x_0 = estimate_at(denoiser, trial, to.t)
            change = slope(trial, trial_x_0, to, flow) - slope(x, x_0, now, flow)
            (_, time), (next_scale, next_time) = frame(now, flow), frame(to, flow)
            # Added to the trial step: x/α itself loses its digits where α is tiny.
            x = trial + next_scale * (next_time - time) / 2 * change
        yield SamplerState(step.number, now.t, x, x_0)
