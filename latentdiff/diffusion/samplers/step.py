"""What every sampler is made of: a grid of noise levels, and one kind of step.

From level t (α_t, σ_t) to the cleaner level s, with an estimate D of the clean image,

    x_s = α_s D + √(σ_s² − V) ε + √V z,     ε = (x_t − α_t D) / σ_t,     z ~ N(0, I)

keeps the marginals of the forward process for every V between 0 and σ_s² (Song et al. 2021, eq. 12,
arXiv:2010.02502) and is exact for an ODE or SDE whose D is constant over the step. So a sampler is
a choice of D (how past and trial estimates are combined: its order) and of V (how much noise is
drawn anew: 0 makes it an ODE solver). Nothing here asks for α² + σ² = 1; flow is included.

λ = ln(α/σ), half the log signal-to-noise ratio, is the time in which most solvers are written.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import UserError

Noise = Callable[[int], Tensor]
Timesteps = Tensor | Sequence[float]
#: Keeps an estimate of x_0 in range.
Bound = Callable[[Tensor], Tensor]
#: (timestep, tensor) pairs of earlier steps that a multistep sampler still needs, newest first.
History = tuple[tuple[float, Tensor], ...]


class SamplerState(NamedTuple):
    """What a sampler yields after each step, and all it needs to go on from there."""

    step: int
    """0 … n−1."""
    t: float
    """The timestep just left."""
    x_t: Tensor
    """The state arrived at, (B, C, H, W); after the last step, the result."""
    x_0: Tensor
    """This step's estimate of the clean image, (B, C, H, W), bounded if asked."""
    history: History = ()
    """Earlier estimates that the next step needs; empty for one-step samplers."""


class Level(NamedTuple):
    """A point of the grid: timestep, α and σ as Python numbers (float64)."""

    t: float
    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """σ/α; infinite in pure noise."""
        return self.sigma / self.alpha if self.alpha > 0 else math.inf

    @property
    def log_snr(self) -> float:
        """λ = ln(α/σ); −∞ in pure noise, ∞ at the clean image."""
        return -math.log(self.ratio) if self.ratio > 0 else math.inf

    @property
    def is_pure_noise(self) -> bool:
        """Whether x here holds nothing of the image (zero SNR)."""
        return self.alpha == 0

    @property
    def is_clean(self) -> bool:
        """Whether x here is the image."""
        return self.sigma == 0


class Step(NamedTuple):
    """One step down the grid."""

    number: int
    """0 … n−1."""
    now: Level
    next: Level
    remaining: int
    """Steps left, this one included."""

    @property
    def h(self) -> float:
        """The step in λ, see `log_snr_step`."""
        return log_snr_step(self.now, self.next)


def log_snr_step(now: Level, to: Level) -> float:
    """h = λ_s − λ_t ≥ 0; infinite from pure noise and to the clean image."""
    return math.inf if now.is_pure_noise or to.is_clean else to.log_snr - now.log_snr


@dataclass(frozen=True)
class Steps:
    """The steps down a grid of noise levels, or those that are left of them.

    Raises (at the first step): UserError: timesteps that do not decrease, or a final one above.
    """

    schedule: NoiseSchedule
    timesteps: Timesteps
    """Strictly decreasing, see `timestep_grid`."""
    final_timestep: float | None = None
    """Where the last step leads. None: the clean image; 0: the first noise level, as
    set_alpha_to_one=False of Stable Diffusion folders has it."""
    after: SamplerState | None = None
    """A state that these timesteps gave; the steps up to it are left out."""

    def __iter__(self) -> Iterator[Step]:
        given = torch.as_tensor(self.timesteps)
        # Rounded to what the denoiser will be given, so that both look up the same level.
        grid = (given.float() if given.is_floating_point() else given).tolist()
        if not grid or any(low >= high for high, low in itertools.pairwise(grid)):
            raise UserError(f"timesteps must decrease strictly and not be empty; got {grid[:8]} …")
        end = self.final_timestep
        end = self.schedule.clean_timestep if end is None else end
        if end > grid[-1]:
            raise UserError(
                f"final_timestep must be at most the last timestep {grid[-1]}; got {end}."
            )
        levels = [self.level(t) for t in [*grid, end]]
        for number in range(0 if self.after is None else self.after.step + 1, len(grid)):
            yield Step(number, levels[number], levels[number + 1], len(grid) - number)

    def level(self, t: float) -> Level:
        """α and σ at timestep t."""
        return Level(t, float(self.schedule.alpha(t)), float(self.schedule.sigma(t)))

    @property
    def history(self) -> History:
        """What a multistep sampler remembers before the first of these steps."""
        return self.after.history if self.after else ()

    def ends_at(self, t: float | None) -> bool:
        """Whether sampling is complete at t: at the first noise level or below (None: clean image).

        A run that stops at a higher level, as inversion does, is resumed from there.
        """
        return t is None or t <= self.schedule.clean_timestep + 1


def advance(
    x: Tensor,
    estimate: Tensor,
    now: Level,
    to: Level,
    variance: float = 0.0,
    z: Callable[[], Tensor] | None = None,
) -> Tensor:
    """The step of the module docstring, from `now` to `to` with D = estimate and V = variance.

    Args:    x, estimate: (B, C, H, W).  variance: 0 … σ_s².  z: draws (B, C, H, W), asked only
             when variance > 0.
    """
    keep = max(to.sigma**2 - variance, 0.0) ** 0.5 / now.sigma
    x = (to.alpha - now.alpha * keep) * estimate + keep * x
    return x if variance <= 0 or z is None else x + variance**0.5 * z()


def ancestral_variance(now: Level, to: Level) -> float:
    """The variance of q(x_s | x_t, x_0): V of ancestral sampling.

    V = σ_s² (1 − e^{−2h}), the largest that leaves the step Markov (Ho et al. 2020, eq. 7).
    """
    return to.sigma**2 * -math.expm1(-2 * log_snr_step(now, to))
