"""The solvers side by side: each a generator over its steps, with its D and V of `step`.

The probability-flow ODE of variance-preserving schedules is straight in x̂ = x/α against the noise
ratio r = σ/α, that of rectified flow in x against σ:

    dx̂/dr = ε(x)            (Karras et al. 2022, eq. 1, arXiv:2206.00364)
    dx/dσ = ε(x) − x_0(x)    (Liu et al. 2022, arXiv:2209.03003)

Euler, Heun and the linear multistep methods are written in these. The solvers of DPM and UniPC take
the linear part of the ODE exactly and step in λ; h = λ_s − λ_t is a step, h' the one before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Literal

import numpy as np
from torch import Tensor

from latentdiff.diffusion.prediction import Denoiser, estimate_at
from latentdiff.diffusion.samplers.step import (
    Bound,
    History,
    Level,
    Noise,
    SamplerState,
    Step,
    Steps,
    advance,
    ancestral_variance,
    log_snr_step,
)
from latentdiff.errors import UserError, choice_error


def ddpm(
    denoiser: Denoiser,
    x: Tensor,
    steps: Steps,
    noise: Noise,
    *,
    variance: Literal["fixed_small", "fixed_large"] = "fixed_small",
) -> Iterator[SamplerState]:
    """Ancestral sampling: draw x_s from q(x_s | x_t, x_0) with the estimated x_0.

    On a grid with gaps the step's own α_t/α_s takes the place of α_t. The step to the clean image
    adds no noise.

    Args:    denoiser: (x_t, t (B,)) -> x_0.  x: (B, C, H, W), at first standard normal.
             steps: those to take.  noise: step -> (B, C, H, W).
             variance: fixed_small (the posterior's) or fixed_large (β of the step).
    Source:  Ho et al. 2020, Algorithm 2 and section 3.2, arXiv:2006.11239.
    """
    if variance not in ("fixed_small", "fixed_large"):
        raise choice_error("variance", variance, ("fixed_small", "fixed_large"))
    for step in steps:
        t, s = step.now.t, step.next.t
        x_0 = estimate_at(denoiser, x, t)
        weight_x_0, weight_x_t, spread = map(float, steps.schedule.posterior(s, t))
        if variance == "fixed_large":
            spread = float(steps.schedule.transition(s, t)[1])
        x = weight_x_0 * x_0 + weight_x_t * x
        if not step.next.is_clean and spread > 0:
            x = x + spread**0.5 * noise(step.number)
        yield SamplerState(step.number, t, x, x_0)


def ddim(
    denoiser: Denoiser,
    x: Tensor,
    steps: Steps,
    noise: Noise,
    *,
    eta: float = 0.0,
    bound: Bound | None = None,
) -> Iterator[SamplerState]:
    """Implicit sampling: the same marginals with less or no noise; first order in the step.

        x_s = α_s x_0 + √(σ_s² − η²V) ε + η√V z,   V the variance of q(x_s | x_t, x_0)

    Args:    denoiser, x, steps, noise: as for `ddpm`; noise is asked only when eta > 0.
             eta: 0 deterministic … 1 as noisy as ddpm.
             bound: of x_0; ε stays that of the unbounded estimate, as in diffusers.
    Source:  Song et al. 2021, eq. 12 and 16, arXiv:2010.02502.
    """
    _check_eta(eta)
    for step in steps:
        t, s = step.now.t, step.next.t
        x_0 = estimate_at(denoiser, x, t)
        eps = (x - step.now.alpha * x_0) / step.now.sigma
        x_0 = x_0 if bound is None else bound(x_0)
        spread = eta**2 * float(steps.schedule.posterior(s, t)[2])
        direction = max(step.next.sigma**2 - spread, 0.0) ** 0.5
        x = step.next.alpha * x_0 + direction * eps
        if spread > 0:
            x = x + spread**0.5 * noise(step.number)
        yield SamplerState(step.number, t, x, x_0)


def _check_eta(eta: float) -> None:
    if not isinstance(eta, int | float) or not 0 <= eta <= 1:
        raise UserError(f"eta must lie in 0 … 1; got {eta!r:.80}.")


def frame(point: Level, is_flow: bool) -> tuple[float, float]:
    """(scale, time) of the straight ODE: it is written in x/scale against time."""
    return (1.0, point.sigma) if is_flow else (point.alpha, point.ratio)


def slope(x: Tensor, x_0: Tensor, point: Level, is_flow: bool) -> Tensor:
    """The right-hand side of the straight ODE."""
    eps = (x - point.alpha * x_0) / point.sigma
    return eps - x_0 if is_flow else eps


def euler(denoiser: Denoiser, x: Tensor, steps: Steps, noise: Noise) -> Iterator[SamplerState]:
    """Euler's method; in these coordinates it is DDIM with η = 0, step for step.

    Args:    as for `ddpm`; noise is never asked.
    Source:  Karras et al. 2022, Algorithm 1 without its correction, arXiv:2206.00364.
    """
    for step in steps:
        x_0 = estimate_at(denoiser, x, step.now.t)
        x = advance(x, x_0, step.now, step.next)
        yield SamplerState(step.number, step.now.t, x, x_0)


def euler_ancestral(
    denoiser: Denoiser, x: Tensor, steps: Steps, noise: Noise, *, eta: float = 1.0
) -> Iterator[SamplerState]:
    """Euler down to a level below the next, then noise up to it.

    With eta = 1 it draws from q(x_s | x_t, x_0), so it is DDPM in other coordinates.

    Args:    as for `ddpm`.  eta: 0 (Euler) … 1, the share of the noise's standard deviation.
    """
    _check_eta(eta)
    for step in steps:
        x_0 = estimate_at(denoiser, x, step.now.t)
        variance = eta**2 * ancestral_variance(step.now, step.next)
        x = advance(x, x_0, step.now, step.next, variance, partial(noise, step.number))
        yield SamplerState(step.number, step.now.t, x, x_0)


def heun(denoiser: Denoiser, x: Tensor, steps: Steps, noise: Noise) -> Iterator[SamplerState]:
    """Heun's second-order method: the mean of the slopes at both ends; two evaluations a step.

    One evaluation, and Euler, where an end has no slope: to the clean image, and from pure noise
    on variance-preserving schedules.

    Args:    as for `ddpm`; noise is never asked.
    Source:  Karras et al. 2022, Algorithm 1, arXiv:2206.00364.
    """
    flow = steps.schedule.is_flow
    for step in steps:
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


#: In runs of fewer steps the last one is of first order (diffusers' lower_order_final).
FEW_STEPS = 15


def extrapolated(x_0: Tensor, history: History, step: Step, steps: Steps) -> Tensor:
    """D = x_0 + (h / 2h') (x_0 − x_0'): the line through two estimates, at half the step.

    First order without a previous estimate, to the clean image, where h is infinite, and in the
    last of few steps.
    """
    last = step.remaining == 1 and steps.ends_at(step.next.t)
    if not history or step.next.is_clean or (last and step.number + 1 < FEW_STEPS):
        return x_0
    t_before, x_0_before = history[0]
    h_before = step.now.log_snr - steps.level(t_before).log_snr
    return x_0 + step.h / (2 * h_before) * (x_0 - x_0_before)


def dpmpp_2m(denoiser: Denoiser, x: Tensor, steps: Steps, noise: Noise) -> Iterator[SamplerState]:
    """DPM-Solver++(2M): second order at one evaluation a step, from the previous estimate.

    Args:    as for `ddpm`; noise is never asked.
    Source:  Lu et al. 2022, Algorithm 2, arXiv:2211.01095.
    """
    history = steps.history
    for step in steps:
        x_0 = estimate_at(denoiser, x, step.now.t)
        x = advance(x, extrapolated(x_0, history, step, steps), step.now, step.next)
        history = ((step.now.t, x_0),)
        yield SamplerState(step.number, step.now.t, x, x_0, history)


def dpmpp_2m_sde(
    denoiser: Denoiser, x: Tensor, steps: Steps, noise: Noise, *, eta: float = 1.0
) -> Iterator[SamplerState]:
    """SDE-DPM-Solver++(2M): the same with noise, V = σ_s² (1 − e^{−2ηh}).

    Args:    as for `ddpm`.  eta: 0 (dpmpp_2m) … 1.
    Source:  Lu et al. 2022, appendix, arXiv:2211.01095, in its midpoint form.
    """
    _check_eta(eta)
    history = steps.history
    for step in steps:
        x_0 = estimate_at(denoiser, x, step.now.t)
        estimate = extrapolated(x_0, history, step, steps)
        variance = step.next.sigma**2 * -math.expm1(-2 * eta * step.h) if eta > 0 else 0.0
        x = advance(x, estimate, step.now, step.next, variance, partial(noise, step.number))
        history = ((step.now.t, x_0),)
        yield SamplerState(step.number, step.now.t, x, x_0, history)


def dpmpp_2s_ancestral(
    denoiser: Denoiser, x: Tensor, steps: Steps, noise: Noise, *, eta: float = 1.0
) -> Iterator[SamplerState]:
    """DPM-Solver++(2S) down to a level below the next, then noise up to it; two evaluations.

    The trial step ends in the middle of λ, a real timestep. One evaluation, and Euler ancestral,
    where λ is infinite: to the clean image and from pure noise.

    Args:    as for `ddpm`.  eta: 0 (plain 2S) … 1, the share of the noise's standard deviation.
    Source:  Lu et al. 2022, Algorithm 1, arXiv:2211.01095, with the noise of Euler ancestral.
    """
    _check_eta(eta)
    for step in steps:
        now, to = step.now, step.next
        x_0 = estimate = estimate_at(denoiser, x, now.t)
        variance = eta**2 * ancestral_variance(now, to)
        down = (to.sigma**2 - variance) ** 0.5 / to.alpha
        if math.isfinite(now.ratio) and down > 0:
            middle = steps.level(steps.schedule.timestep_at((now.ratio * down) ** 0.5))
            estimate = estimate_at(denoiser, advance(x, x_0, now, middle), middle.t)
        x = advance(x, estimate, now, to, variance, partial(noise, step.number))
        yield SamplerState(step.number, now.t, x, x_0)


def unipc_weights(ratios: list[float], h: float) -> list[float]:
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


def unipc_estimate(
    history: History,
    now: Level,
    to: Level,
    steps: Steps,
    arrived: Tensor | None = None,
) -> Tensor:
    """D of the step from `now` to `to`, by UniPC's formula.

        D = m_0 + Σ_k ρ_k (m_k − m_0)/r_k,     Σ_k ρ_k r_k^i = φ_{i+2}(−h) (i+1)! / φ_1(−h)

    with the newest estimate m_0 and older ones m_k at r_k = (λ_k − λ_t)/h, is exact for polynomials
    in λ (φ_1(z) = e^z − 1, φ_{k+1} = φ_k/z − 1/k!).

    Args:    history: estimates, newest (at `now`) first.  arrived: the estimate at `to`, which
             makes this the corrector.
    """
    h = log_snr_step(now, to)
    newest, differences, ratios = history[0][1], [], []
    if h == 0:
        return newest
    for t, x_0 in history[1:]:
        r = (steps.level(t).log_snr - now.log_snr) / h
        if math.isfinite(r) and r != 0:  # a step from pure noise, or to the image, has no slope
            ratios.append(r)
            differences.append((x_0 - newest) / r)
    if arrived is not None:
        ratios.append(1.0)
        differences.append(arrived - newest)
    rho = unipc_weights(ratios, h) if ratios else []
    return sum((w * d for w, d in zip(rho, differences, strict=True)), newest)


def unipc(
    denoiser: Denoiser, x: Tensor, steps: Steps, noise: Noise, *, order: int = 2
) -> Iterator[SamplerState]:
    """UniPC in its data-prediction form with B_2: predictor and corrector at one evaluation a step.

    The corrector takes the last step again once the estimate at its end, r = 1, is known.

    Args:    as for `ddpm`; noise is never asked.  order: 1 … 3, of the predictor; the corrector
             adds one. Towards the end the order falls to 1.
    Source:  Zhao et al. 2023, Algorithms 5-8, arXiv:2302.04867.
    """
    if order not in (1, 2, 3):
        raise UserError(f"the order of unipc must be 1, 2 or 3; got {order}.")
    history = steps.history
    whole = steps.ends_at(steps.final_timestep)
    for step in steps:
        x_0 = estimate_at(denoiser, x, step.now.t)
        if history:  # the state before, and the estimates up to it
            (t_before, x_before), *known = history
            before = steps.level(t_before)
            estimate = unipc_estimate(tuple(known), before, step.now, steps, x_0)
            x = advance(x_before, estimate, before, step.now)
        # The corrector of this step must use as many estimates as its predictor.
        most = min(order, step.remaining) if whole else order
        used = ((step.now.t, x_0), *history[1:])[:most]
        estimate = unipc_estimate(used, step.now, step.next, steps)
        history = ((step.now.t, x), *used)
        x = advance(x, estimate, step.now, step.next)
        yield SamplerState(step.number, step.now.t, x, x_0, history)


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
    denoiser: Denoiser, x: Tensor, steps: Steps, noise: Noise, *, order: int = 4
) -> Iterator[SamplerState]:
    """Linear multistep (Adams-Bashforth) in the coordinates of Euler; one evaluation a step.

    The polynomial through the last slopes is integrated over the step, exactly on any grid.

    Args:    as for `ddpm`; noise is never asked.  order: 1 … 4, the number of slopes used.
    """
    if order not in ADAMS_BASHFORTH:
        raise UserError(f"the order of lms must lie in 1 … 4; got {order}.")
    flow = steps.schedule.is_flow
    history = steps.history
    for step in steps:
        now, to = step.now, step.next
        x_0 = estimate_at(denoiser, x, now.t)
        if now.is_pure_noise and not flow:
            x = advance(x, x_0, now, to)
        else:
            history = ((now.t, slope(x, x_0, now, flow)), *history)[:order]
            times = [frame(steps.level(t), flow)[1] for t, _ in history]
            next_scale, next_time = frame(to, flow)
            parts = lagrange_integrals(times, times[0], next_time)
            # The weights add up to the step, so this is Euler's step and a bend; taken together,
            # x/α and the slopes would cancel in the first digits where α is tiny.
            x = advance(x, x_0, now, to)
            newest = history[0][1]
            for weight, (_, older) in list(zip(parts, history, strict=True))[1:]:
                x = x + next_scale * weight * (older - newest)
        yield SamplerState(step.number, now.t, x, x_0, history)


def pndm(denoiser: Denoiser, x: Tensor, steps: Steps, noise: Noise) -> Iterator[SamplerState]:
    """PLMS, the pseudo linear multistep method: DDIM with ε averaged over up to four steps.

    The average has the Adams-Bashforth weights of equal steps. The first step is Heun's and takes
    two evaluations; the others take one.

    Args:    as for `ddpm`; noise is never asked.
    Source:  Liu et al. 2022, eq. 12 and 13, arXiv:2202.09778, started as in latent diffusion.
    """
    history = steps.history
    for step in steps:
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


def lcm(
    denoiser: Denoiser, x: Tensor, steps: Steps, noise: Noise, *, timestep_scaling: float = 10.0
) -> Iterator[SamplerState]:
    """Latent consistency models: jump to the image, add noise of the next level, jump again.

        f(x, t) = c_skip x + c_out x_0,   x_s = α_s f + σ_s z

    with c_skip = ¼/(τ² + ¼), c_out = τ/√(τ² + ¼), τ = timestep_scaling · t, so that f(x, 0) = x.
    Flow has t = 0 at the clean image itself and needs no such boundary: f = x_0.

    Args:    as for `ddpm`.  timestep_scaling: as the model was distilled.
    Source:  Luo et al. 2023, Algorithm 3, arXiv:2310.04378.
    """
    for step in steps:
        x_0 = estimate_at(denoiser, x, step.now.t)
        if not steps.schedule.is_flow:
            tau = timestep_scaling * step.now.t
            c_skip, c_out = 0.25 / (tau**2 + 0.25), tau / (tau**2 + 0.25) ** 0.5
            x_0 = c_skip * x + c_out * x_0
        variance = step.next.sigma**2
        x = advance(x, x_0, step.now, step.next, variance, partial(noise, step.number))
        yield SamplerState(step.number, step.now.t, x, x_0)
