"""Samplers with the exact denoiser of Gaussian data, against closed forms."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from gaussian_oracle import Gaussian, normal

from latentdiff.diffusion.samplers import run, sample, timestep_grid
from latentdiff.diffusion.schedule import NoiseSchedule, ScheduleConfig

DATA = Gaussian()
SCHEDULES = {
    "linear": ScheduleConfig(kind="linear", beta_start=1e-4, beta_end=0.02),
    "scaled_linear": ScheduleConfig(),
    "zero_snr": ScheduleConfig(zero_terminal_snr=True),
    "cosine": ScheduleConfig(kind="cosine"),
    "flow": ScheduleConfig(kind="flow"),
}


def silent(step: int) -> torch.Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_error_halves_when_the_steps_double(name: str) -> None:
    schedule = NoiseSchedule(SCHEDULES[name])
    x_T = normal((1, 1, 8, 8), dtype=torch.float64)
    exact = DATA.flow_map(x_T, schedule, schedule.last_timestep)
    errors = []
    for steps in (50, 100, 200, 400):
        grid = equal_angles(schedule, steps)
        found = sample("ddim", DATA.denoiser(schedule), x_T, schedule, grid, silent)
        errors.append((found - exact).abs().mean().item())
    ratios = [before / after for before, after in pairwise(errors)]
    print(f"{name}: errors {[f'{e:.1e}' for e in errors]}, ratios {[f'{r:.2f}' for r in ratios]}")
    assert errors[-1] < 0.01
    assert all(1.9 < ratio < 2.1 for ratio in ratios)


def equal_angles(schedule: NoiseSchedule, steps: int) -> torch.Tensor:
    """Real timesteps with equal steps of arctan(σ/α) from the start to the clean image.

    Equal steps of t would add a factor log n to the error: σ grows as the root of t at first.
    """
    t = np.linspace(schedule.clean_timestep, schedule.last_timestep, 100_001)
    levels = torch.from_numpy(t)
    angles = torch.atan2(schedule.sigma(levels), schedule.alpha(levels)).numpy()
    wanted = np.linspace(angles[-1], 0, steps + 1)[:-1]
    return torch.from_numpy(np.interp(wanted, angles, t))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    ("sampler", "steps", "options"),
    [
        ("ddim", 100, {}),
        ("ddim", 100, {"eta": 1.0}),
        ("ddpm", 1000, {}),
        ("ddpm", 100, {"variance": "fixed_large"}),
    ],
)
def test_sampled_moments_match_the_closed_form(
    name: str, sampler: str, steps: int, options: dict
) -> None:
    schedule = NoiseSchedule(SCHEDULES[name])
    count = 40_000
    x_T = normal((1, 1, 200, 200))
    generator = torch.Generator().manual_seed(1)
    grid = timestep_grid(schedule, steps, "trailing")
    result = sample(
        sampler,
        DATA.denoiser(schedule),
        x_T,
        schedule,
        grid,
        lambda step: torch.randn(x_T.shape, generator=generator),
        **options,
    )
    mean, variance = chain_moments(schedule, grid.tolist(), sampler, options)
    off_mean = (result.mean().item() - mean) / (variance / count) ** 0.5
    off_variance = (result.var().item() / variance - 1) / (2 / count) ** 0.5
    print(
        f"{name} {sampler} {steps} {options}: mean {result.mean():.4f} (chain {mean:.4f}, data "
        f"{DATA.mean}), variance {result.var():.4f} (chain {variance:.4f}, data "
        f"{DATA.deviation**2}); off by {off_mean:.1f} and {off_variance:.1f} s.e."
    )
    assert abs(off_mean) < 4 and abs(off_variance) < 4
    # The chain itself ends near the data; what is left is x_T ~ N(0, I) and the finite steps.
    assert mean == pytest.approx(DATA.mean, abs=0.05)
    assert variance == pytest.approx(DATA.deviation**2, abs=0.04 if steps == 100 else 0.006)


def chain_moments(
    schedule: NoiseSchedule, grid: list[float], sampler: str, options: dict
) -> tuple[float, float]:
    """Mean and variance of the sampler's result, step by step: every step is linear plus noise."""
    mean, variance = 0.0, 1.0
    for t, s in zip(grid, [*grid[1:], schedule.clean_timestep], strict=True):
        alpha, sigma = schedule.alpha(t).item(), schedule.sigma(t).item()
        slope, offset = DATA.estimate(alpha, sigma)
        weight_x_0, weight_x_t, spread = map(float, schedule.posterior(s, t))
        if sampler == "ddpm":
            if options.get("variance") == "fixed_large":
                spread = schedule.transition(s, t)[1].item() if s != schedule.clean_timestep else 0
        else:
            spread *= options.get("eta", 0.0) ** 2
            weight_x_t = (schedule.sigma(s).item() ** 2 - spread) ** 0.5 / sigma
            weight_x_0 = schedule.alpha(s).item() - alpha * weight_x_t
        gain = weight_x_0 * slope + weight_x_t
        mean, variance = gain * mean + weight_x_0 * offset, gain**2 * variance + spread
    return mean, variance


def test_eta_one_is_ddpm() -> None:
    """With η = 1 DDIM's step is the posterior's, so the two chains agree on the same noise."""
    schedule = NoiseSchedule(ScheduleConfig())
    x_T, denoiser = normal((2, 1, 8, 8)), DATA.denoiser(schedule)
    grid = timestep_grid(schedule, 40)

    def noise(step: int) -> torch.Tensor:
        return normal(x_T.shape, seed=step + 1)

    ancestral = sample("ddpm", denoiser, x_T, schedule, grid, noise)
    implicit = sample("ddim", denoiser, x_T, schedule, grid, noise, eta=1.0)
    torch.testing.assert_close(implicit, ancestral, rtol=0, atol=1e-5)


def test_the_deterministic_path_keeps_its_quantile() -> None:
    """At every yielded level the state is the exact path's, up to the first-order error."""
    schedule = NoiseSchedule(ScheduleConfig(kind="flow"))
    x_T = normal((1, 1, 8, 8), dtype=torch.float64)
    grid = timestep_grid(schedule, 500)
    for state in run("ddim", DATA.denoiser(schedule), x_T, schedule, grid, silent):
        s = state.t - 2
        alpha, sigma = schedule.alpha(s).item(), schedule.sigma(s).item()
        spread = (alpha**2 * DATA.deviation**2 + sigma**2) ** 0.5
        torch.testing.assert_close(state.x_t, alpha * DATA.mean + spread * x_T, rtol=0, atol=0.01)
