"""What a sampler sees of the network: (x_t, t) -> x_0, bounded if asked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from latentdiff.diffusion.guidance import Predict
from latentdiff.diffusion.prediction import check_prediction, to_x_0
from latentdiff.diffusion.samplers.walk import Denoiser
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import UserError

Bound = Callable[[Tensor], Tensor]


def as_denoiser(predict: Predict, schedule: NoiseSchedule, prediction: str) -> Denoiser:
    """Wrap a network (x_t, t) -> y, guided or not, so that it answers with x_0.

    The denoiser takes t as a (B,) CPU tensor and hands the network a copy on x_t's device.
    Raises:  UserError: for a prediction that the schedule cannot turn into x_0.
    """
    check_prediction(prediction, schedule.config)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        y = predict(x_t, t.to(x_t.device))
        return to_x_0(prediction, y.to(x_t.dtype), x_t, schedule.alpha(t), schedule.sigma(t))

    return denoise


def bound_of(clip: float | None, threshold: float | None) -> Bound | None:
    """What keeps the estimate of the clean image in range; None: nothing does.

    Args:    clip: bound |x_0| by this.  threshold: 0 … 1, the fraction of `dynamic_threshold`.
    Raises:  UserError: both, or one out of range.
    """
    if clip is None and threshold is None:
        return None
    if clip is not None and threshold is not None:
        raise UserError("clip and threshold both bound x_0; give one of them.")
    if threshold is not None:
        if not 0 < threshold <= 1:
            raise UserError(f"threshold must lie in 0 … 1, 0.995 usual; got {threshold}.")
        return lambda x_0: dynamic_threshold(x_0, threshold)
    if not clip or clip < 0:
        raise UserError(f"clip must be above 0; got {clip}.")
    return lambda x_0: x_0.clamp(-clip, clip)


def dynamic_threshold(x_0: Tensor, fraction: float) -> Tensor:
    """Clip each image at the size that this fraction of its values keeps, and scale back to ±1.

        s = max(1, quantile(|x_0|, fraction)),   x_0 ← clip(x_0, −s, s) / s

    For images in pixels; latents are not bounded by 1.
    Args:    x_0: (B, …).
    Source:  Saharia et al. 2022, section 2.3, arXiv:2205.11487.
    """
    limit = torch.quantile(x_0.float().abs().flatten(1), fraction, dim=1).clamp(min=1)
    limit = limit.to(x_0.dtype).reshape(-1, *(1,) * (x_0.ndim - 1))
    return x_0.clamp(-limit, limit) / limit


def bounded(denoiser: Denoiser, bound: Bound | None) -> Denoiser:
    """The denoiser with its estimates bounded."""
    return denoiser if bound is None else lambda x_t, t: bound(denoiser(x_t, t))
