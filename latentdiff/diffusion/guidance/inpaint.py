"""Inpainting without training: where the image is known, it stands in for the estimate.

    x̃_t = m x_t + (1 − m)(α_t x_known + σ_t ε),      x̂_0 = m D(x̃_t, t) + (1 − m) x_known

with m = 1 where to paint and ε the noise that the sampler starts from. The network sees the known
part at the noise level that it expects, always with the same noise, and a deterministic sampler
moves the rest as if it were sampling that part too. Only a start in pure noise, x_t = ε, is seen as
it is: then this is diffusers' StableDiffusionInpaintPipeline for U-Nets without mask channels.

Source: Lugmayr et al. 2022, eq. 8, arXiv:2201.09865 (without its resampling); in latents Avrahami
        et al. 2023, arXiv:2206.02779.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentdiff.diffusion.prediction import Denoiser
from latentdiff.diffusion.schedule import NoiseSchedule


def inpaint(
    denoiser: Denoiser, schedule: NoiseSchedule, known: Tensor, mask: Tensor, noise: Tensor
) -> Denoiser:
    """The denoiser that keeps a known part.

    Args:    denoiser: (x_t (B, …), t (B,)) → x_0.
             known: clean, (B, C, h, w).  mask: 1 where to paint … 0 where known, (B, 1, h, w).
             noise: what the sampler starts from at strength 1, (B, C, h, w).
    """

    def painted(x_t: Tensor, t: Tensor) -> Tensor:
        seen = mask * x_t + (1 - mask) * schedule.q_sample(known, noise, t)
        is_noise = (x_t == noise).flatten(1).all(1)
        seen = torch.where(is_noise[:, None, None, None], x_t, seen)
        return mask * denoiser(seen, t) + (1 - mask) * known

    return painted
