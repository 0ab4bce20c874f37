"""Linear multistep methods over past slopes: LMS, and PNDM's PLMS of old checkpoints.

Both are Adams-Bashforth: the polynomial through the last slopes is integrated over the step. LMS
integrates it exactly on any grid; PLMS uses the weights of equal steps.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from latentdiff.diffusion.samplers.euler_heun import frame, slope
from latentdiff.diffusion.samplers.walk import (
    Denoiser,
    History,
    Noise,
    SamplerState,
    Timesteps,
    advance,
    estimate_at,
    level,
    walk,
)
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import UserError

#: Adams-Bashforth weights for equal steps, newest first, by the number of slopes.
ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def lagrange_integrals(points: list[float], start: float, end: float) -> list[float]:
    """∫ of each Lagrange polynomial of the points, from start to end."""
    found = []
    for j, point in enumerate(points):
        others = np.array(points[:j] + points[j + 1 :])
        # Around `start`, where the polynomials are small numbers.
        antiderivative = np.polyint(
            np.atleast_1d(np.poly(others - start)) / np.prod(point - others)
        )
        found.append(float(np.polyval(antiderivative, end - start)))
    return found


def lms(
    denoiser: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    noise: Noise,
    *,
    order: int = 4,
    final_timestep: float | None = None,
    after: SamplerState | None = None,
) -> Iterator[SamplerState]:
    """Linear multistep in the coordinates of Euler; one evaluation a step.

    Args:    as for `ddpm`; noise is never asked.  order: 1 … 4, the number of slopes used.
    """
    if order not in ADAMS_BASHFORTH:
        raise UserError(f"the order of lms must lie in 1 … 4; got {order}.")
    flow = schedule.is_flow
    x, history = x_T, after.history if after else ()
    for step in walk(schedule, timesteps, final_timestep, after):
        now, to = step.now, step.next
        x_0 = estimate_at(denoiser, x, now.t)
        if now.is_pure_noise and not flow:
            x = advance(x, x_0, now, to)
        else:
            history = ((now.t, slope(x, x_0, now, flow)), *history)[:order]
            times = [frame(level(schedule, t), flow)[1] for t, _ in history]
            next_scale, next_time = frame(to, flow)
            parts = lagrange_integrals(times, times[0], next_time)
            # The weights add up to the step, so this is Euler's step and a bend; taken together,
            # x/α and the slopes would cancel in the first digits where α is tiny.
            x = advance(x, x_0, now, to)
            newest = history[0][1]
            for weight, (_, older) in list(zip(parts, history, strict=True))[1:]:
                x = x + next_scale * weight * (older - newest)
        yield SamplerState(step.number, now.t, x, x_0, history)


def pndm(
    denoiser: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    noise: Noise,
    *,
    final_timestep: float | None = None,
    after: SamplerState | None = None,
) -> Iterator[SamplerState]:
    """PLMS, the pseudo linear multistep method: DDIM with ε averaged over up to four steps.

    The first step is Heun's and takes two evaluations; the others take one.

    Args:    as for `ddpm`; noise is never asked.
    Source:  Liu et al. 2022, eq. 12 and 13, arXiv:2202.09778, started as in latent diffusion.
    """
    x, history = x_T, after.history if after else ()
    for step in walk(schedule, timesteps, final_timestep, after):
        now, to = step.now, step.next
        x_0 = estimate_at(denoiser, x, now.t)
        if now.is_pure_noise:
            x = advance(x, x_0, now, to)
        else:
            eps = (x - now.alpha * x_0) / now.sigma
            history = ((now.t, eps), *history)[:4]
            mean = _mean_eps(history)
            if len(history) == 1 and not to.is_clean:
                trial = advance(x, x_0, now, to)
                trial_x_0 = estimate_at(denoiser, trial, to.t)
                mean = (eps + (trial - to.alpha * trial_x_0) / to.sigma) / 2
            x = to.alpha / now.alpha * (x - now.sigma * mean) + to.sigma * mean
        yield SamplerState(step.number, now.t, x, x_0, history)


def _mean_eps(history: History) -> Tensor:
    parts = zip(ADAMS_BASHFORTH[len(history)], history, strict=True)
    (first, (_, newest)), *rest = parts
    return sum((w * eps for w, (_, eps) in rest), first * newest)
