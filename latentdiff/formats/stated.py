"""What a single file says about its training, and what its weights tell when it says nothing.

Version 1 predicts eps as its YAML does, unless the file says otherwise. Version 2 was published
both ways with the same keys and shapes. At the last noise level x_T is all but pure noise ε, so a
network that predicts eps gives back its input, and one that predicts v = α ε − σ x_0 ≈ −x_0 gives
something unlike it: their correlation decides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentdiff.formats.sd_facts import EPS_STEPS
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.unet import UNet
from latentdiff.tensor_file import TensorFile

#: ModelSpec's words → ours. Source: github.com/Stability-AI/ModelSpec.
MODELSPEC_WORDS = {"epsilon": "eps", "v": "v"}
_ARCHITECTURES = {"stable-diffusion-v2-512": "eps", "stable-diffusion-v2-768-v": "v"}
#: Empty tensors whose names say something: an agreement among trainers.
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"


def stated_prediction(file: TensorFile) -> str | None:
    """What the file says its U-Net predicts; None: nothing."""
    meta = file.metadata
    words = MODELSPEC_WORDS.get(meta.get("modelspec.prediction_type", ""))
    words = words or _ARCHITECTURES.get(meta.get("modelspec.architecture", ""))
    if words is None and V_MARK in file.tensors:
        return "v"
    if words is None and file.facts.get("global_step") in EPS_STEPS:
        return "eps"
    return words


def has_zero_snr(file: TensorFile) -> bool:
    """Whether the schedule in the file, or its mark, ends in pure noise."""
    alpha_bar = file.tensors.get("alphas_cumprod")
    ends = alpha_bar is not None and alpha_bar.numel() > 0 and float(alpha_bar.flatten()[-1]) < 1e-5
    return ZERO_SNR_MARK in file.tensors or ends


@torch.no_grad()
def measured_prediction(unet: UNet, text_encoder: TextEncoder, size: int = 16) -> str:
    """eps or v, by whether the prediction for pure noise is that noise."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, unet.config.in_channels, size, size, generator=generator)
    context = text_encoder.encode([""])
    answer = unet(noise.to(unet.dtype), 999, context.to(unet.dtype)).float()
    return "eps" if _correlation(noise, answer) > 0.5 else "v"


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])
