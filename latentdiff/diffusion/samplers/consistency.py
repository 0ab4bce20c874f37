"""Sampling of latent consistency models, in very few steps."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from latentdiff.diffusion.samplers.walk import (
    Denoiser,
    Noise,
    SamplerState,
    Timesteps,
    advance,
    estimate_at,
    walk,
)
from latentdiff.diffusion.schedule import NoiseSchedule


def lcm(
    denoiser: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    noise: Noise,
    *,
    timestep_scaling: float = 10.0,
    final_timestep: float | None = None,
    after: SamplerState | None = None,
) -> Iterator[SamplerState]:
    """Jump to the image, add fresh noise of the next level, jump again.

        f(x, t) = c_skip x + c_out x_0,   x_s = α_s f + σ_s z

    with c_skip = ¼/(τ² + ¼), c_out = τ/√(τ² + ¼), τ = timestep_scaling · t, so that f(x, 0) = x.
    Flow has t = 0 at the clean image itself and needs no such boundary: f = x_0.

    Args:    as for `ddpm`.  timestep_scaling: as the model was distilled.
    Source:  Luo et al. 2023, Algorithm 3, arXiv:2310.04378.
    """
    x = x_T
    for step in walk(schedule, timesteps, final_timestep, after):
        x_0 = estimate_at(denoiser, x, step.now.t)
        if not schedule.is_flow:
            tau = timestep_scaling * step.now.t
            c_skip, c_out = 0.25 / (tau**2 + 0.25), tau / (tau**2 + 0.25) ** 0.5
            x_0 = c_skip * x + c_out * x_0
        variance = step.next.sigma**2
        x = advance(x, x_0, step.now, step.next, variance, partial(noise, step.number))
        yield SamplerState(step.number, step.now.t, x, x_0)
