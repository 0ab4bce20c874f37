"""Inpainting by the wrapper: what is known comes out, the rest is sampled as it would be."""

from __future__ import annotations

import pytest
import torch

from latentdiff.diffusion.guidance.inpaint import inpaint
from latentdiff.diffusion.noise import step_noise
from latentdiff.diffusion.samplers import SAMPLERS, sample, timestep_grid
from latentdiff.diffusion.schedule import NoiseSchedule, ScheduleConfig
from tests.diffusion.gaussian_oracle import Gaussian, normal

SCHEDULES = {
    "Stable Diffusion": ScheduleConfig(),
    "zero terminal SNR": ScheduleConfig(zero_terminal_snr=True),
    "flow": ScheduleConfig("flow"),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_known_part_comes_out_and_the_rest_is_sampled(sampler: str, schedule: str) -> None:
    """Pixels of the Gaussian are independent: those to paint must not notice the known ones."""
    levels, known, noise = (
        NoiseSchedule(SCHEDULES[schedule]),
        normal((2, 3, 4, 4), 1),
        normal((2, 3, 4, 4), 2),
    )
    mask = torch.zeros(2, 1, 4, 4)
    mask[..., :2] = 1
    grid = timestep_grid(levels, 12, None if levels.is_flow else SAMPLERS[sampler].spacing)
    own = step_noise([3, 4], (3, 4, 4))
    plain = Gaussian().denoiser(levels)
    painted = inpaint(plain, levels, known, mask, noise)
    found = sample(sampler, painted, noise, levels, grid, own)
    free = sample(sampler, plain, noise, levels, grid, own)
    nearly = 2e-3 if sampler == "lcm" else 1e-4  # lcm ends at c_skip x + c_out x_0
    torch.testing.assert_close(found[..., 2:], known[..., 2:], rtol=0, atol=nearly)
    torch.testing.assert_close(found[..., :2], free[..., :2])


def test_the_network_sees_the_known_part_at_its_noise_level_and_a_start_as_it_is() -> None:
    levels, known, noise = (
        NoiseSchedule(ScheduleConfig()),
        normal((1, 3, 4, 4), 1),
        normal((1, 3, 4, 4), 2),
    )
    mask = (torch.arange(16).reshape(1, 1, 4, 4) % 2).float()
    seen = []
    painted = inpaint(lambda x, t: seen.append(x) or x, levels, known, mask, noise)
    other = normal((1, 3, 4, 4), 3)
    painted(other, torch.tensor([600]))
    painted(noise, torch.tensor([981]))
    right = torch.where(mask > 0, other, levels.q_sample(known, noise, 600))
    torch.testing.assert_close(seen[0], right)
    assert torch.equal(seen[1], noise)
