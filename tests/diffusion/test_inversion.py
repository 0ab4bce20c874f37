"""DDIM inversion with the exact denoiser of Gaussian data, and beside the sampler it undoes."""

from __future__ import annotations

import pytest
import torch
from gaussian_oracle import Gaussian, normal
from torch import Tensor

from latentdiff.diffusion.inversion import ddim_inversion
from latentdiff.diffusion.samplers import run, sample, timestep_grid
from latentdiff.diffusion.schedule import NoiseSchedule, ScheduleConfig
from latentdiff.errors import UserError

DATA = Gaussian()
SCHEDULES = {
    "scaled_linear": ScheduleConfig(),
    "zero_snr": ScheduleConfig(zero_terminal_snr=True),
    "cosine": ScheduleConfig(kind="cosine"),
    "flow": ScheduleConfig(kind="flow"),
}


def silent(step: int) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def bent(schedule: NoiseSchedule):
    """A denoiser that is not linear in x_t, nor the same at every position."""
    linear = DATA.denoiser(schedule)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        return linear(x_t, t) + 0.2 * torch.sin(2 * x_t.roll(1, -1))

    return denoise


def inverted(denoiser, x_0: Tensor, schedule: NoiseSchedule, grid: Tensor, **options) -> Tensor:
    x = x_0
    for state in ddim_inversion(denoiser, x_0, schedule, grid, **options):
        x = state.x_t
    return x


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("final_timestep", [None, 0])
def test_the_round_trip_closes_as_the_iterations_grow(name: str, final_timestep) -> None:
    schedule = NoiseSchedule(SCHEDULES[name])
    x_0 = DATA.mean + DATA.deviation * normal((2, 1, 6, 6), dtype=torch.float64)
    grid = timestep_grid(schedule, 20)
    errors = []
    for iterations in (1, 3, 30):
        x_T = inverted(
            bent(schedule),
            x_0,
            schedule,
            grid,
            iterations=iterations,
            final_timestep=final_timestep,
        )
        options = {"final_timestep": final_timestep}
        back = sample("ddim", bent(schedule), x_T, schedule, grid, silent, **options)
        errors.append((back - x_0).abs().max().item())
    print(f"{name}, to {final_timestep}: {[f'{e:.1e}' for e in errors]} for 1, 3, 30 iterations")
    assert errors[2] < 1e-3 and errors[1] < errors[0] and errors[2] < errors[1]


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_finds_the_noise_of_the_exact_path(name: str) -> None:
    """Gaussian data: the exact path keeps the quantile, so x_T is known; first order in steps."""
    schedule = NoiseSchedule(SCHEDULES[name])
    x_T = normal((1, 1, 8, 8), dtype=torch.float64)
    x_0 = DATA.flow_map(x_T, schedule, schedule.last_timestep)
    errors = []
    for steps in (50, 200):
        grid = timestep_grid(schedule, steps, "trailing")
        found = inverted(DATA.denoiser(schedule), x_0, schedule, grid, iterations=20)
        errors.append((found - x_T).abs().mean().item())
    print(f"{name}: mean errors {errors[0]:.4f} at 50 steps, {errors[1]:.4f} at 200")
    assert errors[1] < 0.05 and errors[0] / errors[1] > 2.2


def test_the_states_are_the_samplers_in_reverse_order() -> None:
    schedule = NoiseSchedule(SCHEDULES["scaled_linear"])
    x_0, grid = normal((1, 1, 4, 4), dtype=torch.float64), timestep_grid(schedule, 10)
    up = list(ddim_inversion(bent(schedule), x_0, schedule, grid, iterations=60, final_timestep=0))
    down = list(run("ddim", bent(schedule), up[-1].x_t, schedule, grid, silent, final_timestep=0))
    # Its grid ends at timestep 0, where the last step of the sampler changes nothing.
    assert [state.t for state in up] == grid.tolist()[-2::-1]
    for above, below in zip(up[:-1], reversed(down[:-2]), strict=True):
        torch.testing.assert_close(above.x_t, below.x_t, rtol=0, atol=2e-3)


def test_an_image_is_inverted_the_same_in_any_batch() -> None:
    schedule = NoiseSchedule(SCHEDULES["zero_snr"])
    x_0, grid = normal((3, 1, 4, 4)), timestep_grid(schedule, 5)
    whole = inverted(bent(schedule), x_0, schedule, grid)
    assert torch.equal(inverted(bent(schedule), x_0[1:2], schedule, grid)[0], whole[1])


@pytest.mark.parametrize(
    ("grid", "options", "message"),
    [
        ([10, 20], {}, "decrease strictly"),
        ([], {}, "not be empty"),
        ([20, 10], {"final_timestep": 15}, "final_timestep must be at most the last timestep 10"),
        ([20, 10], {"iterations": 0}, "iterations must be at least 1; got 0"),
    ],
)
def test_bad_input(grid, options, message: str) -> None:
    schedule = NoiseSchedule(SCHEDULES["scaled_linear"])
    with pytest.raises(UserError, match=message):
        inverted(bent(schedule), normal((1, 1, 2, 2)), schedule, grid, **options)
