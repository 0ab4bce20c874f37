"""Algorithm 1: draw t and ε, noise x_0, predict, weighted error.

The weight is thought of in x_0 space. A prediction error e_y is an x_0 error of (σ/det) e_y, so a
weight W on |x_0 error|² is W σ²/det² on |e_y|²; one line covers eps, x0, v and flow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from latentdiff.diffusion.noise import coarse_levels, mix, multi_resolution
from latentdiff.diffusion.prediction import (
    PREDICTIONS,
    Prediction,
    check_prediction,
    determinant,
    target,
)
from latentdiff.diffusion.schedule import NoiseSchedule, ScheduleConfig
from latentdiff.errors import UserError, choice_error

Weighting = Literal["min_snr", "soft_min_snr", "soft_flow", "debiased", "none"]
TimestepSampling = Literal["uniform", "logit_normal"]
Loss = Literal["squared", "huber", "pseudo_huber"]
Model = Callable[[Tensor, Tensor, Any], Tensor]


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the network learns to predict and how its errors are weighted."""

    prediction: Prediction = "v"
    """eps, x0, v or flow."""
    weighting: Weighting = "min_snr"
    """min_snr (Hang et al. 2023), soft_min_snr (Crowson et al. 2024), soft_flow (flow matching's
    own up to γ; pure noise counts too), debiased (Yu et al. 2023) or none (the plain error of the
    prediction)."""
    min_snr_gamma: float = 5.0
    """γ of min_snr, soft_min_snr and soft_flow: the largest weight that an error of x_0 has."""
    loss: Loss = "squared"
    """squared, or one that grows linearly with large errors: huber, pseudo_huber (smooth)."""
    huber_delta: float = 0.1
    """Error of one latent value from which huber and pseudo_huber turn linear."""
    offset_noise: float = 0.0
    """Strength of an extra noise that is constant over each channel; 0 = off, 0.05-0.1 usual."""
    multires_noise: float = 0.0
    """Share of each coarser octave in the noise, relative to the finer one; 0 = off, 0.3 usual."""
    condition_dropout: float = 0.1
    """Share of samples trained with the empty prompt, which guidance needs; 0 … 1."""
    timestep_sampling: TimestepSampling = "uniform"
    """uniform over the noise levels, or logit_normal (more in the middle, Esser et al. 2024)."""
    logit_mean: float = 0.0
    """Location of logit_normal; below 0 less noise is trained more, above 0 more noise."""
    logit_std: float = 1.0
    """Scale of logit_normal; smaller keeps closer to the middle."""

    def __post_init__(self) -> None:
        for name, given, allowed in (
            ("prediction", self.prediction, PREDICTIONS),
            ("weighting", self.weighting, get_args(Weighting)),
            ("loss", self.loss, get_args(Loss)),
            ("timestep_sampling", self.timestep_sampling, get_args(TimestepSampling)),
        ):
            if given not in allowed:
                raise choice_error(name, given, allowed)
        for name in ("min_snr_gamma", "huber_delta", "logit_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} must be above 0; got {getattr(self, name)}.")
        if not math.isfinite(self.logit_mean):
            raise UserError(f"logit_mean must be a finite number; got {self.logit_mean}.")
        if not 0 <= self.offset_noise < math.inf:
            raise UserError(f"offset_noise must be at least 0; got {self.offset_noise}.")
        for name in ("multires_noise", "condition_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must lie in 0 … 1; got {getattr(self, name)}.")


def check_objective(config: ObjectiveConfig, schedule_config: ScheduleConfig) -> None:
    """Refuse what has no finite loss somewhere on the schedule.

    Raises:  UserError: a prediction that the schedule cannot turn into x_0, or a weight that is
             not finite at one of the two ends.
    """
    check_prediction(config.prediction, schedule_config)
    schedule = NoiseSchedule(schedule_config)
    if config.prediction == "eps" and schedule.ends_in_pure_noise:
        raise UserError(
            "prediction 'eps' cannot be used with this schedule: its last step is pure noise "
            f"(alpha = 0) with beta_start={schedule_config.beta_start}, beta_end="
            f"{schedule_config.beta_end}. Lower beta_end, or set prediction to v, flow or x0."
        )
    ends = torch.tensor([0, schedule.last_timestep])
    weights = loss_weight(ends, schedule, config).float()
    for t, weight in zip(ends.tolist(), weights.tolist(), strict=True):
        if not math.isfinite(weight):
            raise UserError(
                f"weighting {config.weighting!r} cannot be used with prediction "
                f"{config.prediction!r} on the {schedule_config.kind} schedule: at t = {t} the "
                f"signal-to-noise ratio is {float(schedule.snr(t)):.3g}, and the weight is "
                "unbounded there. Set weighting to min_snr, soft_min_snr, soft_flow or none, or "
                "prediction to v."
            )


class Draw(NamedTuple):
    """The random part of one training batch, on the CPU."""

    t: Tensor
    """(B,) timesteps: int64 on discrete schedules, float32 on flow."""
    eps: Tensor
    """(B, C, H, W) float32 diffusion noise, offset and coarser noise included."""
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
    pool: Executor | None = None,
) -> Draw:
    """The random numbers of a batch, a pure function of (seed, global sample index).

    Element i is bit-identical in any batch, on any number of processes and after a resume.

    Args:    seed: the run's seed.  sample_indices: global sample indices, one per element.
             shape: (C, H, W) of the latents.  pool: threads that share the work, if any.
    """
    batch, channels = len(sample_indices), shape[0]
    uniforms = torch.empty(batch, 2)
    normals = torch.empty(batch, 2, *shape)
    offsets = torch.empty(batch, channels)
    levels = coarse_levels(shape) if config.multires_noise else ()
    coarse = [torch.empty(batch, *level) for level in levels]

    def fill(rows: range) -> None:
        generator = torch.Generator()
        for row in rows:
            generator.manual_seed(mix(seed, sample_indices[row]))
            torch.rand(2, generator=generator, out=uniforms[row])
            torch.randn(2, *shape, generator=generator, out=normals[row])
            if config.offset_noise:
                torch.randn(channels, generator=generator, out=offsets[row])
            for level in coarse:
                torch.randn(level.shape[1:], generator=generator, out=level[row])

    if pool is None:
        fill(range(batch))
    else:
        list(pool.map(fill, (range(n, min(n + 32, batch)) for n in range(0, batch, 32))))
    eps = multi_resolution(normals[:, 0], coarse, config.multires_noise)
    if config.offset_noise:
        eps = eps + config.offset_noise * offsets[:, :, None, None]
    t = timesteps_from_uniform(uniforms[:, 0], config, schedule)
    return Draw(
        t, eps.contiguous(), uniforms[:, 1] < config.condition_dropout, normals[:, 1].contiguous()
    )


def timesteps_from_uniform(
    uniform: Tensor, config: ObjectiveConfig, schedule: NoiseSchedule
) -> Tensor:
    """Turn uniform numbers in [0, 1) into timesteps of the chosen distribution.

        logit_normal: logit(t/T) ~ N(m, s²)     (Esser et al. 2024, section 3.1, arXiv:2403.03206)

    Returns: int64 in 0 … T−1, or for flow float32 in (0, T].
    """
    if config.timestep_sampling == "logit_normal":
        normal = torch.special.ndtri(uniform.double())
        # Flow takes 1 − u below, so there the location is mirrored first.
        location = -config.logit_mean if schedule.is_flow else config.logit_mean
        uniform = (location + config.logit_std * normal).sigmoid()
    if schedule.is_flow:
        # 1 - u lies in (0, 1]: the clean end has no noise to predict.
        return ((1 - uniform) * schedule.num_train_timesteps).clamp(min=1e-3).float()
    steps = (uniform * schedule.num_train_timesteps).long()
    return steps.clamp(max=schedule.num_train_timesteps - 1)


def loss_weight(t: Tensor, schedule: NoiseSchedule, config: ObjectiveConfig) -> Tensor:
    """Weight of the squared prediction error, W σ²/det² with W the weight in x_0 space.

        min_snr:      W = min(SNR, γ)        (Hang et al. 2023, arXiv:2303.09556); on eps
                      min(SNR, γ)/SNR, on v min(SNR, γ)/(SNR + 1)
        soft_min_snr: W = SNR γ/(SNR + γ)    (Crowson et al. 2024, arXiv:2401.11605)
        soft_flow:    W = 1/(s² + 1/γ) with s = σ/(α + σ), the noise's share: 1/s² weighs errors
                      of x_0 as flow matching does (Lipman et al. 2023, arXiv:2210.02747)
        debiased:     W = √SNR               (Yu et al. 2023, arXiv:2310.08442); on eps 1/√SNR
        none:         1 on the prediction itself

    At zero SNR the SNR weights are 0. soft_flow is about 1 there, and the network learns what the
    prompt alone tells of x_0.
    Returns: (B,) float64.
    """
    alpha, sigma, gamma = schedule.alpha(t), schedule.sigma(t), config.min_snr_gamma
    if config.weighting == "none":
        return torch.ones_like(alpha)
    squared = determinant(config.prediction, alpha, sigma) ** 2
    if config.weighting == "debiased":
        return alpha * sigma / squared
    signal, noise = alpha.square(), gamma * sigma.square()
    # W σ² without dividing by σ²: of v and flow the clean end needs no special case.
    if config.weighting == "min_snr":
        capped = torch.minimum(signal, noise)
    elif config.weighting == "soft_min_snr":
        capped = signal * noise / (signal + noise)
    elif config.weighting == "soft_flow":
        share = (sigma / (alpha + sigma)).square()
        capped = noise / (gamma * share + 1)
    else:
        raise choice_error("weighting", config.weighting, get_args(Weighting))
    weight = capped / squared
    # For x0 det² = σ² vanishes at flow's clean end, where both W are γ.
    return torch.where(sigma == 0, gamma, weight) if config.prediction == "x0" else weight


def error_cost(error: Tensor, config: ObjectiveConfig) -> Tensor:
    """What each prediction error costs, element by element; e² where |e| is small.

        huber:        e² up to δ, then δ (2|e| − δ)            (Huber 1964; twice torch's)
        pseudo_huber: 2δ (√(e² + δ²) − δ)                      (Charbonnier et al. 1997)

    Both grow as 2δ|e|, so that a few odd images do not outvote the rest.
    """
    if config.loss == "squared":
        return error.square()
    delta = config.huber_delta
    if config.loss == "huber":
        return 2 * torch.nn.functional.huber_loss(
            error, torch.zeros_like(error), reduction="none", delta=delta
        )
    if config.loss != "pseudo_huber":
        raise choice_error("loss", config.loss, get_args(Loss))
    # Written without the difference of two near numbers.
    return 2 * error.square() / (1 + torch.sqrt(1 + (error / delta).square()))


def per_sample_loss(
    model: Model,
    x_0: Tensor,
    context: Any,
    draw: Draw,
    schedule: NoiseSchedule,
    config: ObjectiveConfig,
    mask: Tensor | None = None,
) -> Tensor:
    """Algorithm 1: the weighted mean error of each sample, squared unless `config.loss` says else.

        w_t · mean m |y − model(α_t x_0 + σ_t ε, t, context)|²    (Ho et al. 2020, Algorithm 1)

    The mean is over all positions, so what a mask m leaves out makes a sample's loss smaller.

    The caller has already emptied the prompts that `draw.drop` marks: text is encoded from
    captions, so the choice must precede the text encoder.

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
    cost = error_cost(error, config)
    if mask is not None:
        cost = cost * mask
    return weight * cost.flatten(1).mean(1)
