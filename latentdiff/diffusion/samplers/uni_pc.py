"""UniPC: a predictor over past estimates, and a corrector that costs no evaluation.

With m_0 the newest estimate, m_k older ones at r_k = (λ_k − λ_t)/h, both use

    D = m_0 + Σ_k ρ_k (m_k − m_0)/r_k,     Σ_k ρ_k r_k^i = φ_{i+2}(−h) (i+1)! / φ_1(−h)

which is exact for polynomials in λ (φ_1(z) = e^z − 1, φ_{k+1} = φ_k/z − 1/k!). The corrector takes
the last step again once the estimate at its end, r = 1, is known.
Source: Zhao et al. 2023, Theorem 3.1 with B_2(h), arXiv:2302.04867.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from latentdiff.diffusion.samplers.walk import (
    Denoiser,
    History,
    Level,
    Noise,
    SamplerState,
    Step,
    Timesteps,
    advance,
    estimate_at,
    is_end,
    level,
    walk,
)
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import UserError


def weights(ratios: list[float], h: float) -> list[float]:
    """ρ_k for the points at r_k; 1/2 for a single one, which is second order as well."""
    if len(ratios) == 1:
        return [0.5]
    first, factorial, right = math.expm1(-h), 1.0, []
    phi = first / -h - 1
    for i in range(1, len(ratios) + 1):
        right.append(phi * factorial / first)
        factorial *= i + 1
        phi = phi / -h - 1 / factorial
    matrix = np.vander(np.array(ratios), increasing=True).T
    return list(np.linalg.solve(matrix, np.array(right)))


def combined(
    history: History,
    now: Level,
    to: Level,
    schedule: NoiseSchedule,
    arrived: Tensor | None = None,
) -> Tensor:
    """D of the step from `now` to `to`.

    Args:    history: estimates, newest (at `now`) first.  arrived: the estimate at `to`, which
             makes this the corrector.
    """
    h = Step(0, now, to, 1).h
    newest, differences, ratios = history[0][1], [], []
    if h == 0:
        return newest
    for t, x_0 in history[1:]:
        r = (level(schedule, t).log_snr - now.log_snr) / h
        if math.isfinite(r) and r != 0:  # a step from pure noise, or to the image, has no slope
            ratios.append(r)
            differences.append((x_0 - newest) / r)
    if arrived is not None:
        ratios.append(1.0)
        differences.append(arrived - newest)
    rho = weights(ratios, h) if ratios else []
    return sum((w * d for w, d in zip(rho, differences, strict=True)), newest)


def unipc(
    denoiser: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    noise: Noise,
    *,
    order: int = 2,
    final_timestep: float | None = None,
    after: SamplerState | None = None,
) -> Iterator[SamplerState]:
    """UniPC in its data-prediction form with B_2; one evaluation a step.

    Args:    as for `ddpm`; noise is never asked.  order: 1 … 3, of the predictor; the corrector
             adds one. Towards the end the order falls to 1.
    Source:  Zhao et al. 2023, Algorithms 5-8, arXiv:2302.04867.
    """
    if order not in (1, 2, 3):
        raise UserError(f"the order of unipc must be 1, 2 or 3; got {order}.")
    x, history = x_T, after.history if after else ()
    whole = is_end(schedule, final_timestep)
    for step in walk(schedule, timesteps, final_timestep, after):
        x_0 = estimate_at(denoiser, x, step.now.t)
        if history:  # the state before, and the estimates up to it
            (t_before, x_before), *known = history
            before = level(schedule, t_before)
            estimate = combined(tuple(known), before, step.now, schedule, x_0)
            x = advance(x_before, estimate, before, step.now)
        # The corrector of this step must use as many estimates as its predictor.
        most = min(order, step.remaining) if whole else order
        used = ((step.now.t, x_0), *history[1:])[:most]
        estimate = combined(used, step.now, step.next, schedule)
        history = ((step.now.t, x), *used)
        x = advance(x, estimate, step.now, step.next)
        yield SamplerState(step.number, step.now.t, x, x_0, history)
