"""DPM-Solver++: the ODE and the SDE with their linear part solved exactly, second order.

    D = x_0 + (h / 2h') (x_0 − x_0')      (2M: from this and the previous estimate)
    D = x_0 at the middle of the step     (2S: from a trial step)

Source: Lu et al. 2022, arXiv:2211.01095; h = λ_s − λ_t, h' the step before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from torch import Tensor

from latentdiff.diffusion.samplers.walk import (
    Denoiser,
    History,
    Noise,
    SamplerState,
    Step,
    Timesteps,
    advance,
    ancestral_variance,
    check_fraction,
    estimate_at,
    is_end,
    level,
    walk,
)
from latentdiff.diffusion.schedule import NoiseSchedule

#: In runs of fewer steps the last one is of first order (diffusers' lower_order_final).
FEW_STEPS = 15


def extrapolated(x_0: Tensor, history: History, step: Step, schedule: NoiseSchedule) -> Tensor:
    """D of 2M: the line through this and the previous estimate at half the step.

    First order without a previous estimate, to the clean image, where h is infinite, and in the
    last of few steps.
    """
    last = step.remaining == 1 and is_end(schedule, step.next.t)
    if not history or step.next.is_clean or (last and step.number + 1 < FEW_STEPS):
        return x_0
    t_before, x_0_before = history[0]
    h_before = step.now.log_snr - level(schedule, t_before).log_snr
    return x_0 + step.h / (2 * h_before) * (x_0 - x_0_before)


def dpmpp_2m(
    denoiser: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    noise: Noise,
    *,
    final_timestep: float | None = None,
    after: SamplerState | None = None,
) -> Iterator[SamplerState]:
    """DPM-Solver++(2M): second order at one evaluation a step, from the previous estimate.

    Args:    as for `ddpm`; noise is never asked.
    Source:  Lu et al. 2022, Algorithm 2, arXiv:2211.01095.
    """
    x, history = x_T, after.history if after else ()
    for step in walk(schedule, timesteps, final_timestep, after):
        x_0 = estimate_at(denoiser, x, step.now.t)
        x = advance(x, extrapolated(x_0, history, step, schedule), step.now, step.next)
        history = ((step.now.t, x_0),)
        yield SamplerState(step.number, step.now.t, x, x_0, history)


def dpmpp_2m_sde(
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
    """SDE-DPM-Solver++(2M): the same with noise, V = σ_s² (1 − e^{−2ηh}).

    Args:    as for `ddpm`.  eta: 0 (dpmpp_2m) … 1.
    Source:  Lu et al. 2022, appendix, arXiv:2211.01095, in its midpoint form.
    """
    check_fraction("eta", eta)
    x, history = x_T, after.history if after else ()
    for step in walk(schedule, timesteps, final_timestep, after):
        x_0 = estimate_at(denoiser, x, step.now.t)
        estimate = extrapolated(x_0, history, step, schedule)
        variance = step.next.sigma**2 * -math.expm1(-2 * eta * step.h) if eta > 0 else 0.0
        x = advance(x, estimate, step.now, step.next, variance, partial(noise, step.number))
        history = ((step.now.t, x_0),)
        yield SamplerState(step.number, step.now.t, x, x_0, history)


def dpmpp_2s_ancestral(
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
    """DPM-Solver++(2S) down to a level below the next, then noise up to it; two evaluations.

    The middle is that of λ, a real timestep. One evaluation, and Euler ancestral, where λ is
    infinite: to the clean image and from pure noise.

    Args:    as for `ddpm`.  eta: 0 (plain 2S) … 1, the share of the noise's standard deviation.
    Source:  Lu et al. 2022, Algorithm 1, arXiv:2211.01095, with the noise of Euler ancestral.
    """
    check_fraction("eta", eta)
    x = x_T
    for step in walk(schedule, timesteps, final_timestep, after):
        now, to = step.now, step.next
        x_0 = estimate = estimate_at(denoiser, x, now.t)
        variance = eta**2 * ancestral_variance(now, to)
        down = (to.sigma**2 - variance) ** 0.5 / to.alpha
        if math.isfinite(now.ratio) and down > 0:
            middle = level(schedule, schedule.timestep_at((now.ratio * down) ** 0.5))
            estimate = estimate_at(denoiser, advance(x, x_0, now, middle), middle.t)
        x = advance(x, estimate, now, to, variance, partial(noise, step.number))
        yield SamplerState(step.number, now.t, x, x_0)
