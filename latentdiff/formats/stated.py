"""What a single file says about its training, and what its weights tell when it says nothing.

Version 1 predicts eps as its published YAML does, unless the file, or a YAML beside it, says
otherwise. Version 2 was published both ways with the same keys and shapes. At the last noise level
x_T is all but pure noise ε, so a network that predicts eps gives back its input, and one that
predicts v = α ε − σ x_0 ≈ −x_0 gives something unlike it: their correlation decides.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from latentdiff.errors import printable
from latentdiff.formats.inference_yaml import InferenceYaml
from latentdiff.formats.sd_facts import EPS_STEPS
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.unet import UNet
from latentdiff.tensor_file import TensorFile

#: ModelSpec's words → ours. Source: github.com/Stability-AI/ModelSpec.
MODELSPEC_WORDS = {"epsilon": "eps", "v": "v"}
#: Others that stand in their place: those of diffusers and of trainers.
_OTHER_WORDS = {"eps": "eps", "v_prediction": "v", "v_pred": "v", "sample": "x0", "x0": "x0"}
_ARCHITECTURES = {"stable-diffusion-v2-512": "eps", "stable-diffusion-v2-768-v": "v"}
#: Empty tensors whose names say something: an agreement among trainers.
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"


def stated_prediction(file: TensorFile, beside: InferenceYaml | None = None) -> str | None:
    """What a file, or the YAML beside it, says its U-Net predicts; None: nothing.

    A YAML file that says it counts first, since it was put there for that; one that does not, and
    so means eps, counts last.
    """
    within = _within(file)
    if beside is None:
        return within
    if within not in (None, beside.prediction) and beside.says_prediction:
        warnings.warn(
            f"{beside.path} says that the model predicts {beside.prediction}, the file itself says "
            f"{within}; {beside.prediction} is taken.",
            stacklevel=2,
        )
    return beside.prediction if beside.says_prediction or within is None else within


def _within(file: TensorFile) -> str | None:
    given = file.metadata.get("modelspec.prediction_type", "")
    known = MODELSPEC_WORDS | _OTHER_WORDS
    words = known.get(given.strip().lower().replace("-", "_"))
    if given and words is None:
        warnings.warn(
            f"{file.path} says '{printable(given[:40])}' for what it predicts "
            f"(modelspec.prediction_type), which is none of {', '.join(known)}; it is left out.",
            stacklevel=3,
        )
    words = words or _ARCHITECTURES.get(file.metadata.get("modelspec.architecture", ""))
    if words is None and V_MARK in file.tensors:
        return "v"
    if words is None and file.facts.get("global_step") in EPS_STEPS:
        return "eps"
    return words


def has_zero_snr(file: TensorFile) -> bool:
    """Whether the schedule in the file, or its mark, ends in pure noise."""
    alpha_bar = file.tensors.get("alphas_cumprod")
    if alpha_bar is None or not alpha_bar.numel() or not alpha_bar.is_floating_point():
        return ZERO_SNR_MARK in file.tensors
    return ZERO_SNR_MARK in file.tensors or float(alpha_bar.flatten()[-1]) < 1e-5


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
