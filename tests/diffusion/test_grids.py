"""Time grids against diffusers' and against what they promise."""

import math
from itertools import product
from typing import get_args

import numpy as np
import pytest
import torch

from latentdiff.diffusion.samplers import (
    SPACINGS,
    custom_grid,
    get_spacing,
    timestep_grid,
    warn_of_late_start,
)
from latentdiff.diffusion.samplers.grids import GridStyle
from latentdiff.diffusion.samplers.step import Steps
from latentdiff.diffusion.schedule import NoiseSchedule, ScheduleConfig
from latentdiff.errors import UserError

SCHEDULE = NoiseSchedule(ScheduleConfig())
ZERO = NoiseSchedule(ScheduleConfig(zero_terminal_snr=True))
FLOW = NoiseSchedule(ScheduleConfig("flow"))
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "karras", "exponential"])
@pytest.mark.parametrize(
    ("name", "style"),
    [("EulerDiscrete", "real"), ("DPMSolverMultistep", "open"), ("UniPCMultistep", "open")],
)
def test_grids_of_other_schedulers(name: str, style: str, spacing: str) -> None:
    import diffusers

    even = spacing in ("leading", "trailing", "linspace")
    fields = {"timestep_spacing": spacing} if even else {f"use_{spacing}_sigmas": True}
    theirs = getattr(diffusers, name + "Scheduler")(**SD, steps_offset=1, **fields)
    for n in (5, 12, 25, 50):
        theirs.set_timesteps(n)
        found = timestep_grid(SCHEDULE, n, spacing, 1, style=style)
        ratios = SCHEDULE.noise_ratio(found)
        torch.testing.assert_close(ratios.float(), theirs.sigmas[:-1], rtol=2e-4, atol=0)
        if even:
            assert torch.equal(found.float(), theirs.timesteps.float())


def test_lcm_grid_is_that_of_diffusers() -> None:
    from diffusers import LCMScheduler

    theirs = LCMScheduler()
    for n in (1, 2, 4, 7, 8, 50):
        theirs.set_timesteps(n)
        assert torch.equal(timestep_grid(SCHEDULE, n, "lcm"), theirs.timesteps)


def test_align_your_steps_at_ten_steps_is_the_published_list() -> None:
    published = torch.tensor([999, 850, 736, 645, 545, 455, 343, 233, 124, 24])
    found = timestep_grid(SCHEDULE, 10, "ays")
    assert (found - published).abs().max() < 1
    fine = timestep_grid(SCHEDULE, 20, "align_your_steps")
    assert len(fine) == 20 and fine[0] == found[0] and (fine.diff() < 0).all()
    torch.testing.assert_close(fine[2::2], found[1:], rtol=0, atol=0.01)


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize("schedule", [SCHEDULE, ZERO, FLOW], ids=["vp", "zero", "flow"])
def test_levels_are_evenly_spaced_as_promised(schedule: NoiseSchedule, spacing: str) -> None:
    grid = timestep_grid(schedule, 20, spacing)
    assert len(grid) == 20 and (grid.diff() < 0).all() and grid[0] == schedule.last_timestep
    ratios = schedule.noise_ratio(grid).numpy()
    finite = ratios[1:] if schedule.ends_in_pure_noise else ratios
    spread = np.diff(finite ** (1 / 7) if spacing == "karras" else np.log(finite))
    np.testing.assert_allclose(spread, spread.mean(), rtol=1e-3)


@pytest.mark.parametrize("schedule", [SCHEDULE, ZERO, FLOW], ids=["vp", "zero", "flow"])
def test_timestep_at_inverts_the_noise_ratio(schedule: NoiseSchedule) -> None:
    low, high = schedule.clean_timestep, schedule.last_timestep
    for t in (low, low + 0.25, low + 1.5, 400.5, high - 0.5, high):
        ratio = float(schedule.noise_ratio(torch.tensor(t, dtype=torch.float64)))
        assert schedule.timestep_at(ratio) == pytest.approx(t, abs=1e-6)
    assert math.isinf(float(ZERO.noise_ratio(999)))
    with pytest.raises(ValueError, match="noise ratio must lie in"):
        SCHEDULE.timestep_at(100.0)


def test_between_two_steps_the_log_ratio_is_linear() -> None:
    t = torch.tensor([500.0, 500.5, 501.0])
    first, middle, last = SCHEDULE.noise_ratio(t).log()
    assert float(middle) == pytest.approx(float(first + last) / 2, rel=1e-12)


def test_a_list_of_your_own() -> None:
    assert custom_grid(SCHEDULE, [999, 500, 0]).dtype == torch.int64
    assert custom_grid(SCHEDULE, [999, 500.5]).dtype == torch.float32
    assert custom_grid(FLOW, [1000, 500]).dtype == torch.float32
    assert all(get_spacing(name.upper()) == name for name in SPACINGS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: custom_grid(SCHEDULE, []), "decrease strictly"),
        (lambda: custom_grid(SCHEDULE, [5, 5]), "decrease strictly"),
        (lambda: custom_grid(SCHEDULE, [1000, 5]), "at most at 999"),
        (lambda: custom_grid(FLOW, [10, 0]), "above 0"),
        (lambda: custom_grid(SCHEDULE, ["x"]), "must be numbers"),
        (lambda: timestep_grid(SCHEDULE, 5, "karas"), "Did you mean 'karras'"),
        (lambda: timestep_grid(SCHEDULE, 51, "lcm"), "1 … 50 for lcm"),
        (lambda: timestep_grid(SCHEDULE, 1000, "linspace", style="open"), "1 … 999"),
        (lambda: timestep_grid(ZERO, 5, "ays"), "ends in pure noise"),
        (lambda: timestep_grid(FLOW, 5, "linspace"), "flow schedule starts from pure noise"),
    ],
)
def test_faults(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


#: By name, what a checkpoint may have been trained on.
SCHEDULES = {
    "scaled_linear": ScheduleConfig(),
    "DDPM": ScheduleConfig("linear", beta_start=1e-4, beta_end=0.02),
    "cosine": ScheduleConfig("cosine"),
    "zero SNR": ScheduleConfig(zero_terminal_snr=True),
    "cosine, zero SNR": ScheduleConfig("cosine", zero_terminal_snr=True),
    "short": ScheduleConfig(num_train_timesteps=200),
    "long": ScheduleConfig("linear", 4000, beta_start=2.5e-5, beta_end=0.005),
    "flow": ScheduleConfig("flow"),
}


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_grid_is_one_that_samplers_take(name: str, spacing: str) -> None:
    """Whatever the schedule, grid, steps and offset: a run to either end, or a reason."""
    schedule = NoiseSchedule(SCHEDULES[name])
    first, last = schedule.clean_timestep + 1, schedule.last_timestep
    even = spacing in ("leading", "linspace")
    ways = product(get_args(GridStyle), (0, 1)) if even else [("whole", 1)]
    for n, (style, offset) in product(range(1, 51), ways):
        if (name, spacing) in UNSUITED:
            with pytest.raises(UserError, match=r"was found for sch|starts from pure noise"):
                timestep_grid(schedule, n, spacing, offset, style=style)
            continue
        grid = timestep_grid(schedule, n, spacing, offset, style=style)
        assert len(grid) == n and first <= grid[-1] and grid[0] <= last
        assert bool((grid.diff() < 0).all())
        if n in (1, 5, 20):
            for end in (None, first):
                assert all(step.h >= 0 for step in Steps(schedule, grid, end))


#: Grids that do not fit their schedule.
UNSUITED = {
    *(("flow", spacing) for spacing in ("leading", "linspace", "lcm", "align_your_steps")),
    *((name, "align_your_steps") for name in ("zero SNR", "cosine, zero SNR", "short")),
}


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_grids_of_levels_end_at_the_first_level_itself(name: str, spacing: str) -> None:
    schedule = NoiseSchedule(SCHEDULES[name])
    for n in (3, 10, 50):
        grid = timestep_grid(schedule, n, spacing)
        assert float(grid[-1]) == pytest.approx(schedule.clean_timestep + 1, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "spacing", "n", "late"),
    [
        ("scaled_linear", "leading", 1, True),
        ("scaled_linear", "linspace", 1, True),
        ("DDPM", "leading", 1, True),
        ("cosine", "linspace", 1, True),
        ("scaled_linear", "leading", 2, False),
        ("scaled_linear", "trailing", 1, False),
        ("scaled_linear", "karras", 1, False),
        ("scaled_linear", "lcm", 1, False),
        ("zero SNR", "trailing", 1, False),
        ("flow", "trailing", 1, False),
    ],
)
def test_a_start_at_the_clean_end_is_warned_of(
    name: str, spacing: str, n: int, late: bool, recwarn: pytest.WarningsRecorder
) -> None:
    schedule = NoiseSchedule(SCHEDULES[name])
    warn_of_late_start(schedule, timestep_grid(schedule, n, spacing, 1))
    assert ["will be noise" in str(w.message) for w in recwarn] == [True] * late
