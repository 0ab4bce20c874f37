"""DDIM backwards: from a clean image to the noise that DDIM turns into it.

DDIM's step from t to the cleaner s is x_s = α_s x̂_0 + σ_s ε̂, with both estimates made at x_t.
Turned round, with w = α_t ε̂ − σ_t x̂_0 (the v of variance-preserving schedules),

    x_t = [(α_t² + σ_t²) x_s + (α_s σ_t − σ_s α_t) w(x_t, t)] / (α_s α_t + σ_s σ_t)

holds x_t on both sides. With x_s in its place on the right, one evaluation is the usual inversion
(Song et al. 2021, section 5.4, arXiv:2010.02502); each further one brings x_t nearer to the exact
solution (Pan et al. 2023, arXiv:2309.04907). Nothing is divided by σ_s or α_t, so it starts at the
clean image itself and ends in pure noise.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from latentdiff.diffusion.prediction import Denoiser, estimate_at
from latentdiff.diffusion.samplers.step import SamplerState, Steps, Timesteps
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import UserError


def ddim_inversion(
    denoiser: Denoiser,
    x_0: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    iterations: int = 3,
    final_timestep: int | None = None,
) -> Iterator[SamplerState]:
    """The states of `ddim` on the same grid in reverse order; the last one's x_t is the noise.

    Args:    denoiser: (x_t, t (B,)) -> x_0.  x_0: (B, C, H, W) clean.
             timesteps: decreasing, the grid that will lead back.
             iterations: evaluations per step, at least 1; 1 is fast and inexact.
             final_timestep: that of the sampler; None: the clean image.
    Raises:  UserError: a grid that does not decrease, iterations below 1.
    """
    if iterations < 1:
        raise UserError(f"iterations must be at least 1; got {iterations}.")
    x = x_0
    # A grid may end at the timestep that the last step leads to: that step changes nothing.
    back = [step for step in Steps(schedule, timesteps, final_timestep) if step.now != step.next]
    for number, step in enumerate(reversed(back)):
        (t, alpha_t, sigma_t), (_, alpha_s, sigma_s) = step.now, step.next
        square = alpha_t**2 + sigma_t**2
        turn = alpha_s * sigma_t - sigma_s * alpha_t
        start = x
        for _ in range(iterations):
            estimate = estimate_at(denoiser, x, t)
            w = (alpha_t * x - square * estimate) / sigma_t
            x = (square * start + turn * w) / (alpha_s * alpha_t + sigma_s * sigma_t)
        yield SamplerState(number, t, x, estimate)
