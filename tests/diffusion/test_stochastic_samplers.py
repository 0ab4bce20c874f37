"""Mean and covariance of 20,000 samples against the exact chain of each stochastic sampler.

With Gaussian data the denoiser is affine, so every step is an affine map plus noise. The maps are
written here in x̂ = x/α and r = σ/α, as k-diffusion has them, for each eigenvector of the data's
covariance; two estimates make a chain of two numbers.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from latentdiff.diffusion.samplers import sample, timestep_grid
from latentdiff.diffusion.schedule import NoiseSchedule, ScheduleConfig

COUNT = 20_000
MEAN = np.array([0.8, -0.3])
COVARIANCE = np.array([[0.5, 0.3], [0.3, 0.4]])
SCHEDULES = {
    "scaled_linear": NoiseSchedule(ScheduleConfig()),
    "zero_snr": NoiseSchedule(ScheduleConfig(zero_terminal_snr=True)),
    "flow": NoiseSchedule(ScheduleConfig("flow")),
}
Chain = tuple[np.ndarray, np.ndarray]  # mean and covariance of (x, previous estimate)


def coefficients(schedule: NoiseSchedule, t: float) -> tuple[float, float]:
    return float(schedule.alpha(t)), float(schedule.sigma(t))


def affine(alpha: float, sigma: float, mean: float, variance: float) -> tuple[float, float]:
    """(a, b) of E[x_0 | x_t] = a x_t + b."""
    a = alpha * variance / (alpha**2 * variance + sigma**2)
    return a, mean * (1 - a * alpha)


def up_and_down(now: tuple[float, float], to: tuple[float, float], eta: float) -> tuple:
    """σ_up and σ_down of ancestral sampling in x̂."""
    r_s = to[1] / to[0]
    up = eta * r_s * math.sqrt(1 - (r_s * now[0] / now[1]) ** 2)
    return up, math.sqrt(max(r_s**2 - up**2, 0))


def moved(now: tuple, to: tuple, up: float, down: float) -> tuple[float, float, float]:
    """x_s = α_s (D + σ_down/r_t (x̂ − D) + up z): factors of D, x, and the noise's variance."""
    per_x, per_d = down / now[1], down * now[0] / now[1]
    return to[0] * (1 - per_d), to[0] * per_x, (to[0] * up) ** 2


def euler_ancestral(schedule, now, to, a, b, gaussian, before, eta=1.0):
    d, x, variance = moved(now, to, *up_and_down(now, to, eta))
    return np.array([[d * a + x, 0], [a, 0]]), np.array([d * b, b]), variance


def dpmpp_2s_ancestral(schedule, now, to, a, b, gaussian, before, eta=1.0):
    up, down = up_and_down(now, to, eta)
    d, x, variance = moved(now, to, up, down)
    if down > 0 and now[0] > 0:
        middle = math.sqrt(now[1] / now[0] * down)
        alpha = 1 / (1 + middle) if schedule.is_flow else 1 / math.sqrt(1 + middle**2)
        half_d, half_x, _ = moved(now, (alpha, alpha * middle), 0.0, middle)
        a_m, b_m = affine(alpha, alpha * middle, *gaussian)
        a, b = a_m * (half_d * a + half_x), a_m * half_d * b + b_m
    return np.array([[d * a + x, 0], [0, 0]]), np.array([d * b, 0]), variance


def dpmpp_2m_sde(schedule, now, to, a, b, gaussian, before, eta=1.0):
    decay = now[0] * to[1] / (to[0] * now[1])  # e^{−h}
    per_x, per_d = to[1] / now[1] * decay**eta, to[0] * (1 - decay ** (1 + eta))
    extra = 0.0
    if before is not None and before[0] > 0 and to[1] > 0:
        h = -math.log(decay)
        h_before = math.log(now[0] / now[1]) - math.log(before[0] / before[1])
        extra = h / (2 * h_before)
    step = np.array([[per_x + per_d * (1 + extra) * a, -per_d * extra], [a, 0]])
    return step, np.array([per_d * (1 + extra) * b, b]), to[1] ** 2 * (1 - decay ** (2 * eta))


def ddpm(schedule, now, to, a, b, gaussian, before, large=False):
    ratio = now[0] / to[0]
    beta = now[1] ** 2 - (ratio * to[1]) ** 2
    per_d, per_x = to[0] * beta / now[1] ** 2, ratio * to[1] ** 2 / now[1] ** 2
    variance = beta if large and to[1] > 0 else beta * to[1] ** 2 / now[1] ** 2
    return np.array([[per_d * a + per_x, 0], [0, 0]]), np.array([per_d * b, 0]), variance


def lcm(schedule, now, to, a, b, gaussian, before):
    skip, out = 0.0, 1.0
    if not schedule.is_flow:
        tau = 10 * now[2]
        skip, out = 0.25 / (tau**2 + 0.25), tau / math.sqrt(tau**2 + 0.25)
    return (
        np.array([[to[0] * (out * a + skip), 0], [0, 0]]),
        np.array([to[0] * out * b, 0]),
        (to[1] ** 2),
    )


def chain(schedule: NoiseSchedule, grid: list, step: Callable, mean: float, variance: float):
    """Exact mean and variance at the end, for data N(mean, variance)."""
    m, c, before = np.zeros(2), np.diag([1.0, 0.0]), None
    for t, s in zip(grid, [*grid[1:], schedule.clean_timestep], strict=True):
        now, to = (*coefficients(schedule, t), t), coefficients(schedule, s)
        a, b = affine(now[0], now[1], mean, variance)
        matrix, offset, noise = step(schedule, now, to, a, b, (mean, variance), before)
        m, c = matrix @ m + offset, matrix @ c @ matrix.T + np.diag([noise, 0])
        before = now
    return m[0], c[0, 0]


def denoiser(schedule: NoiseSchedule) -> Callable[[Tensor, Tensor], Tensor]:
    """E[x_0 | x_t] of N(MEAN, COVARIANCE), on the two channels."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = coefficients(schedule, t[0])
        gain = alpha * COVARIANCE @ np.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * np.eye(2))
        offset = torch.from_numpy(MEAN - alpha * gain @ MEAN).float()
        return x @ torch.from_numpy(gain).float().T + offset

    return denoise


CASES = {
    "ddpm": (ddpm, {}, {}),
    "ddpm, fixed_large": (ddpm, {"variance": "fixed_large"}, {"large": True}),
    "ddim": (euler_ancestral, {"eta": 0.6}, {"eta": 0.6}),
    "euler_ancestral": (euler_ancestral, {}, {}),
    "euler_ancestral, 0.5": (euler_ancestral, {"eta": 0.5}, {"eta": 0.5}),
    "dpmpp_2s_ancestral": (dpmpp_2s_ancestral, {}, {}),
    "dpmpp_2m_sde": (dpmpp_2m_sde, {}, {}),
    "dpmpp_2m_sde, 0.5": (dpmpp_2m_sde, {"eta": 0.5}, {"eta": 0.5}),
    "lcm": (lcm, {}, {}),
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("case", CASES)
def test_mean_and_covariance_are_those_of_the_chain(case: str, kind: str) -> None:
    step, options, changes = CASES[case]
    schedule = SCHEDULES[kind]
    grid = timestep_grid(schedule, 12, "trailing")
    generator = torch.Generator().manual_seed(3)

    def noise(number: int) -> Tensor:
        return torch.randn((COUNT, 2), generator=generator)

    found = sample(
        case.split(",")[0], denoiser(schedule), noise(-1), schedule, grid, noise, **options
    )
    values, vectors = np.linalg.eigh(COVARIANCE)

    def one(*arguments):
        return step(*arguments, **changes)

    ends = [
        chain(schedule, grid.tolist(), one, m, v)
        for m, v in zip(vectors.T @ MEAN, values, strict=True)
    ]
    mean = vectors @ np.array([m for m, _ in ends])
    covariance = vectors @ np.diag([v for _, v in ends]) @ vectors.T
    sampled = found.double().numpy()
    diagonal = np.diag(covariance)
    off_mean = (sampled.mean(0) - mean) / np.sqrt(diagonal / COUNT)
    error = np.sqrt((np.outer(diagonal, diagonal) + covariance**2) / COUNT)
    off_covariance = (np.cov(sampled.T) - covariance) / error
    print(f"{case} {kind}: {off_mean.round(1)}, {off_covariance.round(1).tolist()} s.e.")
    assert np.abs(off_mean).max() < 4 and np.abs(off_covariance).max() < 4
