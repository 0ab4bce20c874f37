"""DDPM and DDIM against diffusers' schedulers on the same network, start and step noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gaussian_oracle import normal
from torch import Tensor

from latentdiff.diffusion.prediction import target
from latentdiff.diffusion.samplers import as_denoiser, run, sample, timestep_grid
from latentdiff.diffusion.schedule import NoiseSchedule, ScheduleConfig

SHAPE = (2, 4, 8, 8)
TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "cosine": (1e-4, 0.02)}


def network(config: ScheduleConfig, prediction: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A small nonlinear network that mixes channels and neighbours and depends on t.

    Its opinion is an image of values up to ±1.3, so that clipping at 0.5 bites; it is told as
    eps, x0 or v, so that the state stays of order 1 as with a trained network.
    """
    schedule = NoiseSchedule(config)

    def answer(x: Tensor, t: Tensor) -> Tensor:
        time = (t.to(x.dtype) / 1000)[:, None, None, None]
        mixed = 0.4 * x + 0.2 * x.roll(1, 1) - 0.2 * x.roll(1, 3) * (1 - time)
        image = 1.2 * torch.tanh(mixed) + 0.1 * torch.sin(x.roll(2, 2) + 5 * time)
        alpha, sigma = schedule.alpha(t[0]).item(), schedule.sigma(t[0]).item()
        return target(prediction, image, (x - alpha * image) / sigma, alpha, sigma)

    return answer


def noise(step: int) -> Tensor:
    return normal(SHAPE, seed=1000 + step)


def scheduler_fields(config: ScheduleConfig, prediction: str, clip: float | None) -> dict:
    return {
        "num_train_timesteps": config.num_train_timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": "squaredcos_cap_v2" if config.kind == "cosine" else config.kind,
        "rescale_betas_zero_snr": config.zero_terminal_snr,
        "prediction_type": TYPES[prediction],
        "clip_sample": clip is not None,
        "clip_sample_range": clip or 1.0,
    }


def config_of(kind: str, zero_snr: bool = False) -> ScheduleConfig:
    start, end = BETAS[kind]
    return ScheduleConfig(kind=kind, beta_start=start, beta_end=end, zero_terminal_snr=zero_snr)


def largest_difference(ours: Any, theirs: Any, scheduler: Any) -> float:
    """Run both, return the largest difference over all steps."""
    worst = 0.0
    states = iter(ours)
    for step, t in enumerate(scheduler.timesteps):
        state = next(states)
        expected = theirs(step, t)
        assert state.t == t
        worst = max(worst, (state.x_t - expected).abs().max().item())
    assert next(states, None) is None
    return worst


SCHEDULES = [
    ("linear", False, "leading", 0),
    ("scaled_linear", False, "leading", 1),
    ("scaled_linear", False, "trailing", 0),
    ("scaled_linear", True, "trailing", 0),
    ("cosine", False, "leading", 0),
    ("cosine", False, "trailing", 0),
]


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("prediction", TYPES)
@pytest.mark.parametrize(("kind", "zero_snr", "spacing", "offset"), SCHEDULES)
@pytest.mark.parametrize(("eta", "alpha_to_one"), [(0.0, False), (0.7, True)])
def test_ddim(
    kind: str,
    zero_snr: bool,
    spacing: str,
    offset: int,
    prediction: str,
    clip: float | None,
    alpha_to_one: bool,
    eta: float,
) -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    if prediction == "eps" and (zero_snr or (kind == "cosine" and spacing == "trailing")):
        pytest.skip("alpha is 0, or lost in float32, at the first step")
    config = config_of(kind, zero_snr)
    scheduler = DDIMScheduler(
        **scheduler_fields(config, prediction, clip),
        timestep_spacing=spacing,
        steps_offset=offset,
        set_alpha_to_one=alpha_to_one,
    )
    scheduler.set_timesteps(50)
    model = network(config, prediction)
    x_T = normal(SHAPE)
    current = x_T

    def theirs(step: int, t: Tensor) -> Tensor:
        nonlocal current
        y = model(current, t.expand(len(current)))
        current = scheduler.step(
            y, t, current, eta=eta, variance_noise=noise(step) if eta else None
        ).prev_sample
        return current

    schedule = NoiseSchedule(config)
    ours = run(
        "ddim",
        as_denoiser(model, schedule, prediction),
        x_T,
        schedule,
        timestep_grid(schedule, 50, spacing, offset),
        noise,
        eta=eta,
        clip=clip,
        final_timestep=None if alpha_to_one else 0,
    )
    worst = largest_difference(ours, theirs, scheduler)
    print(f"largest difference {worst:.1e}")
    assert worst < 1e-4


DDPM_SCHEDULES = [
    ("linear", False, "leading", 50, "fixed_small"),
    ("scaled_linear", False, "linspace", 30, "fixed_large"),
    ("scaled_linear", True, "trailing", 50, "fixed_small"),
    ("cosine", False, "leading", 50, "fixed_large"),
    ("scaled_linear", False, "leading", 1000, "fixed_small"),
    pytest.param("linear", False, "leading", 1000, "fixed_large", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("prediction", TYPES)
@pytest.mark.parametrize(("kind", "zero_snr", "spacing", "steps", "variance"), DDPM_SCHEDULES)
def test_ddpm(
    kind: str,
    zero_snr: bool,
    spacing: str,
    steps: int,
    variance: str,
    prediction: str,
    clip: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from diffusers.schedulers import scheduling_ddpm

    if prediction == "eps" and zero_snr:
        pytest.skip("alpha is 0 at the first step")
    config = config_of(kind, zero_snr)
    scheduler = scheduling_ddpm.DDPMScheduler(
        **scheduler_fields(config, prediction, clip),
        timestep_spacing=spacing,
        variance_type=variance,
    )
    scheduler.set_timesteps(steps)
    model = network(config, prediction)
    x_T = normal(SHAPE)
    current = x_T

    def theirs(step: int, t: Tensor) -> Tensor:
        nonlocal current
        last = step == steps - 1
        injected = torch.zeros(SHAPE) if last else noise(step)
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *a, **k: injected)
        y = model(current, t.expand(len(current)))
        current = scheduler.step(y, t, current).prev_sample
        return current

    schedule = NoiseSchedule(config)
    ours = run(
        "ddpm",
        as_denoiser(model, schedule, prediction),
        x_T,
        schedule,
        timestep_grid(schedule, steps, spacing),
        noise,
        clip=clip,
        variance=variance,
    )
    worst = largest_difference(ours, theirs, scheduler)
    print(f"largest difference {worst:.1e}")
    assert worst < 1e-4


@pytest.mark.parametrize("prediction", TYPES)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_algorithms_are_equal_to_float64_rounding(
    prediction: str, clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With diffusers' tables widened to float64, what is left is the order of operations."""
    from diffusers.schedulers import scheduling_ddim, scheduling_ddpm

    config = config_of("scaled_linear")
    schedule, model = NoiseSchedule(config), network(config, prediction)
    fields = scheduler_fields(config, prediction, clip)
    ancestral = scheduling_ddpm.DDPMScheduler(**fields)
    implicit = scheduling_ddim.DDIMScheduler(**fields)
    for scheduler in (ancestral, implicit):
        scheduler.alphas_cumprod = schedule.alpha_bar(torch.arange(1000))
        scheduler.set_timesteps(50)
    x_T = normal(SHAPE, dtype=torch.float64)
    states = [x_T, x_T]
    ours = [
        run(name, as_denoiser(model, schedule, prediction), x_T, schedule, grid, wide_noise, **more)
        for name, grid, more in (
            ("ddpm", ancestral.timesteps, {"clip": clip}),
            ("ddim", implicit.timesteps, {"clip": clip, "eta": 0.5}),
        )
    ]
    for step, (t, mine, implied) in enumerate(zip(ancestral.timesteps, *ours, strict=True)):
        injected = wide_noise(step)
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *a, n=injected, **k: n)
        y = [model(x, t.expand(len(x))) for x in states]
        states[0] = ancestral.step(y[0], t, states[0]).prev_sample
        states[1] = implicit.step(y[1], t, states[1], eta=0.5, variance_noise=injected).prev_sample
        for found, expected in zip((mine.x_t, implied.x_t), states, strict=True):
            assert (found - expected).abs().max() < 1e-9


def wide_noise(step: int) -> Tensor:
    return noise(step).double()


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_grids_are_those_of_diffusers(spacing: str) -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    schedule = NoiseSchedule(ScheduleConfig())
    for offset in (0, 1):
        theirs = DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
        for steps in (*range(1, 130), *range(130, 1001, 9), 999, 1000):
            theirs.set_timesteps(steps)
            expected = theirs.timesteps[:steps]
            if expected[0] > 999:
                continue  # diffusers' grid leaves its own table here
            found = timestep_grid(schedule, steps, spacing, offset)
            assert torch.equal(found, expected), (steps, offset)


def test_sample_is_the_last_state() -> None:
    schedule = NoiseSchedule(ScheduleConfig())
    denoiser = as_denoiser(network(schedule.config, "v"), schedule, "v")
    grid = timestep_grid(schedule, 10)
    *_, last = run("DDIMScheduler", denoiser, normal(SHAPE), schedule, grid, noise)
    assert torch.equal(sample("ddim", denoiser, normal(SHAPE), schedule, grid, noise), last.x_t)
