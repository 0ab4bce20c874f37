"""Noise schedules: how much of the image and how much noise x_t holds at each timestep.

Every schedule is the pair (α_t, σ_t) of

    q(x_t | x_0) = N(α_t x_0, σ_t² I),   x_t = α_t x_0 + σ_t ε          (Ho et al. 2020, eq. 4)

Three are variance preserving, α_t² + σ_t² = 1 with ᾱ_t = α_t² = Π (1 − β_i); rectified flow is the
straight line α = 1 − s, σ = s with timestep = T·s.

Timesteps count as in diffusers: discrete schedules use t = 0 … T−1 (the lecture's t is t + 1) and
t = −1 is the clean image, ᾱ = 1. Flow uses t = 0 (clean) … T (pure noise), any real number.
Tables are float64 on the CPU; a real t between two discrete steps interpolates log(σ/α) linearly,
as every sampler's grid of noise levels does. Where that is infinite (before t = 0, and in the last
step to zero SNR) ᾱ is interpolated.

Shape and precision of the per-sample coefficients that multiply images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from latentdiff.errors import UserError, choice_error

ScheduleKind = Literal["linear", "scaled_linear", "cosine", "flow"]
Timestep = int | float | Tensor


@dataclass(frozen=True)
class ScheduleConfig:
    """Which noise schedule, and its end points."""

    kind: ScheduleKind = "scaled_linear"
    """linear (DDPM), scaled_linear (Stable Diffusion), cosine (improved DDPM), flow (rectified)."""
    num_train_timesteps: int = 1000
    """Number of noise levels T."""
    beta_start: float = 0.00085
    """First β of linear and scaled_linear."""
    beta_end: float = 0.012
    """Last β of linear and scaled_linear."""
    zero_terminal_snr: bool = False
    """Rescale so that the last step is pure noise; needs a v, flow or x0 prediction."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(ScheduleKind):
            raise choice_error("schedule kind", self.kind, get_args(ScheduleKind))
        if self.num_train_timesteps < 2:
            raise UserError(
                f"num_train_timesteps must be at least 2; got {self.num_train_timesteps}."
            )
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise UserError(
                "beta_start and beta_end must satisfy 0 < beta_start <= beta_end < 1; "
                f"got {self.beta_start} and {self.beta_end}."
            )
        if self.kind == "flow" and self.zero_terminal_snr:
            raise UserError(
                "zero_terminal_snr does not apply to the flow schedule, which ends in pure noise "
                "already; set zero_terminal_snr=false."
            )


def betas(config: ScheduleConfig) -> Tensor:
    """β_t of a variance-preserving schedule, before any zero-terminal-SNR rescaling.

    Returns: (T,) float64.
    Source:  linear: Ho et al. 2020, section 4; scaled_linear: Rombach et al. 2022 (linear in √β);
             cosine: Nichol & Dhariwal 2021, eq. 17, β clipped at 0.999.
    """
    steps = config.num_train_timesteps
    first, last = config.beta_start, config.beta_end
    if config.kind == "linear":
        return torch.linspace(first, last, steps, dtype=torch.float64)
    if config.kind == "scaled_linear":
        return torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64).square()
    time = torch.arange(steps + 1, dtype=torch.float64) / steps
    curve = torch.cos((time + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - curve[1:] / curve[:-1]).clamp(max=0.999)


def rescale_to_zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Shift and scale √ᾱ so that the last step is pure noise and the first keeps its value.

    Args:    alpha_bar: (T,) ᾱ_t.
    Returns: (T,) with the last element exactly 0.
    Source:  Lin et al. 2024, Algorithm 1, arXiv:2305.08891.
    """
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()


class NoiseSchedule:
    """α_t, σ_t and what follows from them, for one ScheduleConfig.

    Every method takes t as int, float or tensor (see the module docstring for the range), gives
    float64 of t's shape on t's device, and raises UserError for a t outside the range.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        self.num_train_timesteps = config.num_train_timesteps
        self.is_flow = config.kind == "flow"
        self.clean_timestep = 0 if self.is_flow else -1
        self.last_timestep = self.num_train_timesteps - (0 if self.is_flow else 1)
        self._alpha_bar = torch.empty(0, dtype=torch.float64)
        if not self.is_flow:
            alpha_bar = torch.cumprod(1 - betas(config), dim=0)
            if config.zero_terminal_snr:
                alpha_bar = rescale_to_zero_terminal_snr(alpha_bar)
            # Entry 0 belongs to t = -1, the clean image.
            self._alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar])
        self._log_ratio = ((1 - self._alpha_bar) / self._alpha_bar).log() / 2

    @property
    def ends_in_pure_noise(self) -> bool:
        """Whether x at the last timestep holds nothing of x_0 (zero terminal SNR)."""
        return bool(self.alpha(self.last_timestep) == 0)

    def alpha(self, t: Timestep) -> Tensor:
        """α_t, the factor of x_0 in x_t; √ᾱ_t for variance-preserving schedules."""
        t = self._checked(t)
        if self.is_flow:
            return 1 - t / self.num_train_timesteps
        return self._interpolated(t).sqrt()

    def sigma(self, t: Timestep) -> Tensor:
        """σ_t, the factor of ε in x_t; √(1 − ᾱ_t) for variance-preserving schedules."""
        t = self._checked(t)
        if self.is_flow:
            return t / self.num_train_timesteps
        return (1 - self._interpolated(t)).sqrt()

    def alpha_bar(self, t: Timestep) -> Tensor:
        """ᾱ_t = α_t², the signal's share of x_t; the variance of the noise is σ_t² = 1 − ᾱ_t."""
        return self.alpha(t).square()

    def snr(self, t: Timestep) -> Tensor:
        """Signal-to-noise ratio α_t² / σ_t²; infinite for the clean image."""
        return (self.alpha(t) / self.sigma(t)).square()

    def noise_ratio(self, t: Timestep) -> Tensor:
        """σ_t / α_t, the noise level in units of the image; infinite at zero SNR."""
        return self.sigma(t) / self.alpha(t)

    def timestep_at(self, noise_ratio: float) -> float:
        """The real t whose σ_t/α_t this is, the inverse of `noise_ratio`.

        Raises:  UserError: a level that the schedule does not reach.
        """
        if self.is_flow:
            fraction = 1.0 if math.isinf(noise_ratio) else noise_ratio / (1 + noise_ratio)
            return self.num_train_timesteps * fraction
        alpha_bar = 1 / (1 + noise_ratio**2)
        table = self._alpha_bar
        # A ratio that was rounded to float32 may lie just outside.
        if not (1 - 1e-6) * table[-1] - 1e-12 <= alpha_bar <= 1:
            raise UserError(
                f"a noise ratio must lie in 0 … {float(self.noise_ratio(self.last_timestep)):.6g}, "
                f"what this schedule reaches; got {noise_ratio}."
            )
        upper = min(max(int((table >= alpha_bar).sum()), 1), len(table) - 1)
        ends = self._log_ratio[upper - 1 : upper + 1]
        if ends.isfinite().all():
            low, high, wanted = float(ends[0]), float(ends[1]), math.log(noise_ratio)
        else:
            low, high, wanted = float(table[upper - 1]), float(table[upper]), alpha_bar
        return upper - 2 + min((wanted - low) / (high - low), 1.0)

    def transition(self, s: Timestep, t: Timestep) -> tuple[Tensor, Tensor]:
        """Scale and variance of q(x_t | x_s) = N(scale · x_s, variance · I), for s cleaner than t.

        scale = α_t/α_s,  variance = σ_t² − scale² σ_s²; for s = t−1 these are √(1−β_t) and β_t.
        Source:  Kingma et al. 2021, eq. 20-21, arXiv:2107.00630.
        """
        scale = self.alpha(t) / self.alpha(s)
        return scale, self.sigma(t).square() - (scale * self.sigma(s)).square()

    def posterior(self, s: Timestep, t: Timestep) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of x_0 and x_t in the mean of q(x_s | x_t, x_0), and its variance, for s < t.

            mean = (α_s β/σ_t²) x_0 + (r σ_s²/σ_t²) x_t,   variance = β σ_s²/σ_t²

        where q(x_t | x_s) = N(r x_s, β I); with s = t−1 this is Ho et al. 2020, eq. 6-7.
        Returns: (weight of x_0, weight of x_t, variance), float64 of t's shape.
        """
        scale, beta = self.transition(s, t)
        noise_s, noise_t = self.sigma(s).square(), self.sigma(t).square()
        return self.alpha(s) * beta / noise_t, scale * noise_s / noise_t, beta * noise_s / noise_t

    def beta(self, t: Timestep) -> Tensor:
        """β_t, the variance that one step from t−1 to t adds."""
        return self.transition(self._checked(t) - 1, t)[1]

    def q_sample(self, x_0: Tensor, eps: Tensor, t: Timestep) -> Tensor:
        """Noise x_0 to timestep t at once.

            x_t = α_t x_0 + σ_t ε             (Ho et al. 2020, eq. 4)

        Args:    x_0, eps: (B, C, H, W).  t: (B,) or a number.
        Returns: (B, C, H, W), float32 or wider.
        """
        return per_sample(self.alpha(t), x_0) * x_0 + per_sample(self.sigma(t), eps) * eps

    def q_step(self, x_prev: Tensor, eps: Tensor, t: Timestep) -> Tensor:
        """One step of the forward chain, from t−1 to t.

            x_t = √(1 − β_t) x_{t−1} + √β_t ε      (Ho et al. 2020, eq. 2)

        Args:    x_prev, eps: (B, C, H, W).  t: (B,) or a number, the step arrived at.
        """
        scale, variance = self.transition(self._checked(t) - 1, t)
        return per_sample(scale, x_prev) * x_prev + per_sample(variance.sqrt(), eps) * eps

    def _checked(self, t: Timestep) -> Tensor:
        t = torch.as_tensor(t)
        if (
            t.numel()
            and not self.clean_timestep <= t.min().item() <= t.max().item() <= self.last_timestep
        ):
            raise UserError(
                f"timestep must lie in {self.clean_timestep} … {self.last_timestep} for the "
                f"{self.config.kind} schedule; got {t.min().item()} … {t.max().item()}."
            )
        return t.to(torch.float64)

    def _interpolated(self, t: Tensor) -> Tensor:
        table, log_ratio = self._alpha_bar.to(t.device), self._log_ratio.to(t.device)
        position = t + 1
        lower, upper = position.floor().long(), position.ceil().long()
        linear = torch.lerp(table[lower], table[upper], position - lower)
        between = torch.lerp(log_ratio[lower], log_ratio[upper], position - lower)
        return torch.where((lower < upper) & between.isfinite(), (-2 * between).sigmoid(), linear)


def per_sample(values: Tensor | float, like: Tensor) -> Tensor | float:
    """Make (B,) coefficients multiply a (B, C, H, W) tensor.

    Args:    values: (B,) or 0-d tensor, any device; a plain number passes through.
             like: the tensor to be multiplied; gives device and number of dimensions.
    Returns: (B, 1, 1, 1) tensor, at least float32 (float64 where `like` is float64).
    """
    if not isinstance(values, Tensor):
        return values
    dtype = torch.promote_types(like.dtype, torch.float32)
    values = values.to(dtype).to(like.device, non_blocking=True)
    return (
        values.reshape(values.shape + (1,) * (like.ndim - values.ndim)) if values.ndim else values
    )
