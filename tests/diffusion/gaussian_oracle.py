"""Data N(μ, s² I), for which everything a sampler does has a closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentdiff.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True)
class Gaussian:
    mean: float = 0.8
    deviation: float = 0.5

    def estimate(self, alpha: float, sigma: float) -> tuple[float, float]:
        """(slope, offset) of E[x_0 | x_t] = slope · x_t + offset."""
        total = alpha**2 * self.deviation**2 + sigma**2
        slope = alpha * self.deviation**2 / total
        return slope, self.mean * (1 - slope * alpha)

    def denoiser(self, schedule: NoiseSchedule):
        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            level = t[0]
            slope, offset = self.estimate(
                schedule.alpha(level).item(), schedule.sigma(level).item()
            )
            return slope * x_t + offset

        return denoise

    def flow_map(self, x_T: Tensor, schedule: NoiseSchedule, start: float) -> Tensor:
        """Where the exact deterministic path from x_T at `start` ends."""
        alpha, sigma = schedule.alpha(start).item(), schedule.sigma(start).item()
        total = (alpha**2 * self.deviation**2 + sigma**2) ** 0.5
        return self.mean + self.deviation * (x_T - alpha * self.mean) / total


def normal(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
