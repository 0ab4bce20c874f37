"""Images of correlated Gaussian values, for which the bound and the ODE have closed forms.

An image is a row of independent blocks; the values of a block have covariance Q diag(λ) Qᵀ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from latentdiff.diffusion.schedule import NoiseSchedule

BLOCK = 8
LN2 = math.log(2)


@dataclass(frozen=True)
class Blocks:
    """Exact figures are in bits per dimension, expectations over data and noise."""

    shape: tuple[int, int, int] = (4, 8, 16)
    mean: float = 0.4

    @property
    def variances(self) -> Tensor:
        return torch.logspace(-1.5, 0.2, BLOCK, dtype=torch.float64)

    @property
    def basis(self) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        return torch.linalg.qr(
            torch.randn(BLOCK, BLOCK, generator=generator, dtype=torch.float64)
        ).Q

    def draw(self, count: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(count, *self.shape, generator=generator, dtype=torch.float64)
        blocks = x.reshape(-1, BLOCK) * self.variances.sqrt()
        return (blocks @ self.basis.T).reshape(x.shape) + self.mean

    def denoiser(self, schedule: NoiseSchedule):
        basis = self.basis

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
            gain = alpha * self.variances / (alpha**2 * self.variances + sigma**2)
            off = x_t - (alpha * self.mean)[..., None, None]
            inside = off.reshape(len(x_t), -1, BLOCK) @ basis
            return (inside * gain[:, None] @ basis.T).reshape(x_t.shape) + self.mean

        return denoise

    def log_density(self, x_0: Tensor) -> Tensor:
        """ln p of each image, nats."""
        inside = (x_0 - self.mean).reshape(len(x_0), -1, BLOCK) @ self.basis
        each = inside.square() / self.variances + (2 * math.pi * self.variances).log()
        return -0.5 * each.flatten(1).sum(1)

    def entropy(self) -> float:
        return float(0.5 * (2 * math.pi * math.e * self.variances).log().mean()) / LN2

    def left(self, schedule: NoiseSchedule, t: Tensor | int) -> Tensor:
        """Variance of x_0 given x_t, by direction, (…, BLOCK)."""
        return 1 / (1 / self.variances + schedule.snr(t)[..., None])

    def reconstruction(self, schedule: NoiseSchedule) -> float:
        """−E ln p(x_0 | x_1)."""
        first = schedule.clean_timestep + 1
        beta = schedule.beta(first)
        each = self.left(schedule, first) / beta + (2 * math.pi * beta).log()
        return float(0.5 * each.mean()) / LN2

    def squares(self) -> Tensor:
        """E x_0², by direction; the constant mean shows in the directions as Qᵀ 1."""
        return self.variances + self.means().square()

    def means(self) -> Tensor:
        return self.mean * self.basis.sum(0)

    def bound(self, schedule: NoiseSchedule) -> float:
        """−E of the evidence lower bound, DDPM's form."""
        first, last = schedule.clean_timestep + 1, schedule.last_timestep
        t = torch.arange(first + 1, last + 1)
        gain = schedule.snr(t - 1) - schedule.snr(t)
        denoising = 0.5 * (gain[:, None] * self.left(schedule, t)).sum(0).mean()
        alpha, variance = schedule.alpha(last), schedule.sigma(last).square()
        prior = 0.5 * (alpha.square() * self.squares() + variance - 1 - variance.log()).mean()
        return self.reconstruction(schedule) + float(denoising + prior) / LN2

    def ode(self, schedule: NoiseSchedule, start: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of x at `start` that the exact ODE makes of N(0, I), by direction."""
        last = schedule.last_timestep
        widths = [
            (schedule.alpha(t).square() * self.variances + schedule.sigma(t).square()).sqrt()
            for t in (start, last)
        ]
        ratio = widths[0] / widths[1]
        means = (schedule.alpha(start) - ratio * schedule.alpha(last)) * self.means()
        return means, ratio.square()

    def ode_bound(self, schedule: NoiseSchedule) -> float:
        """−E of `ode_likelihood.ode_bound`."""
        first = schedule.clean_timestep + 1
        mean, variance = self.ode(schedule, first)
        true_mean = schedule.alpha(first) * self.means()
        noise = schedule.sigma(first).square()
        true_variance = schedule.alpha(first).square() * self.variances + noise
        log_p = -0.5 * (
            (2 * math.pi * variance).log()
            + (true_variance + (true_mean - mean).square()) / variance
        )
        entropy = 0.5 * (2 * math.pi * math.e * noise).log()
        return self.reconstruction(schedule) - float(log_p.mean() + entropy) / LN2

    def ode_log_density(self, x: Tensor, schedule: NoiseSchedule, start: int) -> Tensor:
        """ln of the exact ODE's density at x, nats per image."""
        mean, variance = self.ode(schedule, start)
        inside = x.reshape(len(x), -1, BLOCK) @ self.basis
        each = (inside - mean).square() / variance + (2 * math.pi * variance).log()
        return -0.5 * each.flatten(1).sum(1)
