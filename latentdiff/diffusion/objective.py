"""Algorithm 1: draw t and ε, noise x_0, predict, weighted squared error.

The weight is thought of in x_0 space. A prediction error e_y is an x_0 error of (σ/det) e_y, so a
weight W on |x_0 error|² is W σ²/det² on |e_y|²; one line covers eps, x0, v and flow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from latentdiff.diffusion.noise import mix
from latentdiff.diffusion.prediction import PREDICTIONS, Prediction, determinant, target
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import UserError, choice_error

Weighting = Literal["min_snr", "none", "debiased"]
TimestepSampling = Literal["uniform", "logit_normal"]
Model = Callable[[Tensor, Tensor, Any], Tensor]


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the network learns to predict and how its errors are weighted."""

    prediction: Prediction = "v"
    """eps, x0, v or flow."""
    weighting: Weighting = "min_snr"
    """min_snr (Hang et al. 2023), debiased (Yu et al. 2023) or none (plain squared error)."""
    min_snr_gamma: float = 5.0
    """γ of min_snr: signal-to-noise ratios above it count as γ."""
    offset_noise: float = 0.0
    """Strength of an extra noise that is constant over each channel; 0 = off, 0.05-0.1 usual."""
    condition_dropout: float = 0.1
    """Share of samples trained with the empty prompt, which guidance needs; 0 … 1."""
    timestep_sampling: TimestepSampling = "uniform"
    """uniform over the noise levels, or logit_normal (more in the middle, Esser et al. 2024)."""

    def __post_init__(self) -> None:
        for name, given, allowed in (
            ("prediction", self.prediction, PREDICTIONS),
            ("weighting", self.weighting, get_args(Weighting)),
            ("timestep_sampling", self.timestep_sampling, get_args(TimestepSampling)),
        ):
            if given not in allowed:
                raise choice_error(name, given, allowed)
        if self.min_snr_gamma <= 0:
            raise UserError(f"min_snr_gamma must be above 0; got {self.min_snr_gamma}.")
        if self.offset_noise < 0:
            raise UserError(f"offset_noise must be at least 0; got {self.offset_noise}.")
        if not 0 <= self.condition_dropout <= 1:
            raise UserError(f"condition_dropout must lie in 0 … 1; got {self.condition_dropout}.")


class Draw(NamedTuple):
    """The random part of one training batch, on the CPU."""

    t: Tensor
    """(B,) timesteps: int64 on discrete schedules, float32 on flow."""
    eps: Tensor
    """(B, C, H, W) float32 diffusion noise, offset noise included."""
    drop: Tensor
    """(B,) bool: train this sample with the empty prompt."""
    posterior_eps: Tensor
    """(B, C, H, W) float32 noise for sampling the autoencoder's posterior."""


def draw(
    seed: int,
    sample_indices: Sequence[int],
    shape: Sequence[int],
    config: ObjectiveConfig,
    schedule: NoiseSchedule,
) -> Draw:
    """The random numbers of a batch, a pure function of (seed, global sample index).

    Element i is bit-identical in any batch, on any number of processes and after a resume.

    Args:    seed: the run's seed.  sample_indices: global sample indices, one per element.
             shape: (C, H, W) of the latents.
    """
    batch, channels = len(sample_indices), shape[0]
    uniforms = torch.empty(batch, 2)
    normals = torch.empty(batch, 2, *shape)
    offsets = torch.empty(batch, channels)
    generator = torch.Generator()
    for row, index in enumerate(sample_indices):
        generator.manual_seed(mix(seed, index))
        torch.rand(2, generator=generator, out=uniforms[row])
        torch.randn(2, *shape, generator=generator, out=normals[row])
        if config.offset_noise:
            torch.randn(channels, generator=generator, out=offsets[row])
    eps = normals[:, 0]
    if config.offset_noise:
        eps = eps + config.offset_noise * offsets[:, :, None, None]
    t = timesteps_from_uniform(uniforms[:, 0], config.timestep_sampling, schedule)
    return Draw(
        t, eps.contiguous(), uniforms[:, 1] < config.condition_dropout, normals[:, 1].contiguous()
    )


def timesteps_from_uniform(uniform: Tensor, sampling: str, schedule: NoiseSchedule) -> Tensor:
    """Turn uniform numbers in [0, 1) into timesteps of the chosen distribution.

    Source:  logit_normal: Esser et al. 2024, section 3.1 (location 0, scale 1), arXiv:2403.03206.
    Returns: int64 in 0 … T−1, or for flow float32 in (0, T].
    """
    if sampling == "logit_normal":
        uniform = torch.special.ndtri(uniform.double()).sigmoid()
    if schedule.is_flow:
        # 1 - u lies in (0, 1]: the clean end has no noise to predict.
        return ((1 - uniform) * schedule.num_train_timesteps).clamp(min=1e-3).float()
    steps = (uniform * schedule.num_train_timesteps).long()
    return steps.clamp(max=schedule.num_train_timesteps - 1)


def loss_weight(t: Tensor, schedule: NoiseSchedule, config: ObjectiveConfig) -> Tensor:
    """Weight of the squared prediction error, W σ²/det² with W the weight in x_0 space.

        min_snr:  W = min(SNR, γ)   (Hang et al. 2023, arXiv:2303.09556); on eps min(SNR, γ)/SNR,
                  on v min(SNR, γ)/(SNR + 1)
        debiased: W = √SNR          (Yu et al. 2023, arXiv:2310.08442); on eps 1/√SNR
        none:     1 on the prediction itself

    At zero SNR min_snr and debiased give a v prediction weight 0: nothing of x_0 is left to find.
    Returns: (B,) float64.
    """
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    if config.weighting == "none":
        return torch.ones_like(alpha)
    squared = determinant(config.prediction, alpha, sigma) ** 2
    if config.weighting == "min_snr":
        # W σ² = min(α², γ σ²): no division, so the clean end needs no special case.
        return torch.minimum(alpha.square(), config.min_snr_gamma * sigma.square()) / squared
    return alpha * sigma / squared


def per_sample_loss(
    model: Model,
    x_0: Tensor,
    context: Any,
    draw: Draw,
    schedule: NoiseSchedule,
    config: ObjectiveConfig,
    mask: Tensor | None = None,
) -> Tensor:
    """Algorithm 1: the weighted mean squared error of each sample.

        w_t · mean m |y − model(α_t x_0 + σ_t ε, t, context)|²    (Ho et al. 2020, Algorithm 1)

    The mean is over all positions, so what a mask m leaves out makes a sample's loss smaller.

    The caller has already emptied the prompts that `draw.drop` marks: text is encoded from
    captions, so the choice must precede the text encoder (or use `drop_context`).

    Args:    x_0: (B, C, H, W) clean latents.  context: whatever the model takes third.
             mask: (B, 1, H, W), the weight of each position; None: all 1.
    Returns: (B,) float32 on x_0's device.
    """
    x_0, eps = x_0.float(), draw.eps.to(x_0.device, non_blocking=True)
    x_t = schedule.q_sample(x_0, eps, draw.t)
    alpha, sigma = schedule.alpha(draw.t), schedule.sigma(draw.t)
    y = model(x_t, draw.t.to(x_0.device, non_blocking=True), context)
    error = y.float() - target(config.prediction, x_0, eps, alpha, sigma)
    weight = loss_weight(draw.t, schedule, config).float().to(x_0.device, non_blocking=True)
    squares = error.square() if mask is None else error.square() * mask
    return weight * squares.flatten(1).mean(1)


def drop_context(context: Tensor, empty_context: Tensor, drop: Tensor) -> Tensor:
    """Replace the context of the marked samples by that of the empty prompt.

    Args:    context: (B, tokens, dim).  empty_context: (tokens, dim) or (1, tokens, dim).
             drop: (B,) bool.
    """
    return torch.where(drop.to(context.device)[:, None, None], empty_context, context)
