"""The lecture's two samplers: DDPM (Algorithm 2) and DDIM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import Tensor

from latentdiff.diffusion.posterior import posterior_coefficients
from latentdiff.diffusion.samplers.denoiser import Bound
from latentdiff.diffusion.samplers.walk import (
    Denoiser,
    Noise,
    SamplerState,
    Timesteps,
    check_fraction,
    estimate_at,
    walk,
)
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import choice_error


def ddpm(
    denoiser: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    noise: Noise,
    *,
    variance: Literal["fixed_small", "fixed_large"] = "fixed_small",
    final_timestep: float | None = None,
    after: SamplerState | None = None,
) -> Iterator[SamplerState]:
    """Ancestral sampling: draw x_s from q(x_s | x_t, x_0) with the estimated x_0.

    On a grid with gaps the step's own α_t/α_s takes the place of α_t. The step to the clean image
    adds no noise.

    Args:    denoiser: (x_t, t (B,)) -> x_0.  x_T: (B, C, H, W) standard normal.
             timesteps: decreasing, see `timestep_grid`.  noise: step -> (B, C, H, W).
             variance: fixed_small (the posterior's) or fixed_large (β of the step).
             final_timestep: where the last step leads. None: the clean image; 0: the first noise
             level, as set_alpha_to_one=False of Stable Diffusion folders has it.
             after: a state to go on from, see `resume`.
    Source:  Ho et al. 2020, Algorithm 2 and section 3.2, arXiv:2006.11239.
    """
    if variance not in ("fixed_small", "fixed_large"):
        raise choice_error("variance", variance, ("fixed_small", "fixed_large"))
    x = x_T
    for step in walk(schedule, timesteps, final_timestep, after):
        t, s = step.now.t, step.next.t
        x_0 = estimate_at(denoiser, x, t)
        weight_x_0, weight_x_t, spread = map(float, posterior_coefficients(schedule, s, t))
        if variance == "fixed_large":
            spread = float(schedule.transition(s, t)[1])
        x = weight_x_0 * x_0 + weight_x_t * x
        if not step.next.is_clean and spread > 0:
            x = x + spread**0.5 * noise(step.number)
        yield SamplerState(step.number, t, x, x_0)


def ddim(
    denoiser: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    noise: Noise,
    *,
    eta: float = 0.0,
    bound: Bound | None = None,
    final_timestep: float | None = None,
    after: SamplerState | None = None,
) -> Iterator[SamplerState]:
    """Implicit sampling: the same marginals with less or no noise; first order in the step.

        x_s = α_s x_0 + √(σ_s² − η²V) ε + η√V z,   V the variance of q(x_s | x_t, x_0)

    Args:    denoiser, x_T, timesteps, noise, final_timestep, after: as for `ddpm`; noise is asked
             only when eta > 0.
             eta: 0 deterministic … 1 as noisy as ddpm.
             bound: of x_0; ε stays that of the unbounded estimate, as in diffusers.
    Source:  Song et al. 2021, eq. 12 and 16, arXiv:2010.02502.
    """
    check_fraction("eta", eta)
    x = x_T
    for step in walk(schedule, timesteps, final_timestep, after):
        t, s = step.now.t, step.next.t
        x_0 = estimate_at(denoiser, x, t)
        eps = (x - step.now.alpha * x_0) / step.now.sigma
        x_0 = x_0 if bound is None else bound(x_0)
        spread = eta**2 * float(posterior_coefficients(schedule, s, t)[2])
        direction = max(step.next.sigma**2 - spread, 0.0) ** 0.5
        x = step.next.alpha * x_0 + direction * eps
        if spread > 0:
            x = x + spread**0.5 * noise(step.number)
        yield SamplerState(step.number, t, x, x_0)
