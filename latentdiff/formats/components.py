"""The parts of a text-to-image model, whatever kind of file they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from latentdiff.diffusion.prediction import check_prediction
from latentdiff.diffusion.schedule import ScheduleConfig
from latentdiff.errors import UserError
from latentdiff.formats.scheduler_config import SamplingDefaults
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.unet import UNet
from latentdiff.models.unet_config import UNetConfig
from latentdiff.weight_files import place_weights

#: What a Stable Diffusion U-Net with that many input channels is given besides four of latents.
SPECIAL_INPUTS = {
    5: "a depth model (a depth map beside the latents)",
    7: "an upscaler (a small picture beside the latents)",
    8: "an InstructPix2Pix model (the latents of a picture to edit beside the noisy ones)",
    9: "an inpainting model (a mask and the latents of the masked picture beside the noisy ones)",
}


@dataclass
class Components:
    """Everything that a text-to-image model consists of."""

    unet: UNet
    """The denoiser."""
    autoencoder: Autoencoder
    """Images ↔ latents."""
    text_encoder: TextEncoder
    """Prompts → context."""
    schedule: ScheduleConfig
    """The noise schedule of the training."""
    prediction: str
    """What the U-Net predicts: eps, x0, v or flow."""
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    """How to sample when the caller does not say."""
    dtype_on_disk: torch.dtype = torch.float32
    """What the U-Net was stored in; saving keeps to it unless told otherwise."""
    dropped: list[str] = field(default_factory=list)
    """Keys of the file or folder that no part has a use for."""
    spare: dict[str, Tensor] = field(default_factory=dict)
    """What OpenCLIP's tower has besides the layers in use, by its keys in a single file: of no use
    here, and kept for single files, since other programs look for it."""

    def check(self) -> None:
        """Refuse parts that do not fit together.

        Raises: UserError: latent channels, text width or prediction do not match.
        """
        unet, latent = self.unet.config, self.autoencoder.latent_channels
        check_inputs(unet, latent)
        for name, value in (("in_channels", unet.in_channels), ("out_channels", unet.out_channels)):
            if value != latent:
                raise UserError(
                    f"the U-Net's {name} must equal the autoencoder's latent channels ({latent}); "
                    f"got {value}. They come from different models."
                )
        if unet.cross_attention_dim != self.text_encoder.width:
            raise UserError(
                f"the U-Net's cross_attention_dim must equal the text encoder's width "
                f"({self.text_encoder.width}); got {unet.cross_attention_dim}. "
                "They come from different models."
            )
        check_prediction(self.prediction, self.schedule)

    def part_dtypes(self, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
        """What each part is saved in: `dtype`, or what it was stored in."""
        vae, text = self.autoencoder.dtype_on_disk, self.text_encoder.dtype_on_disk
        return {
            "unet": dtype or self.dtype_on_disk,
            "vae": dtype or vae or self.dtype_on_disk,
            "text_encoder": dtype or text or self.dtype_on_disk,
        }


def check_inputs(unet: UNetConfig, latent_channels: int = 4) -> None:
    """Refuse by name a U-Net that is given more than noisy latents. Raises: UserError."""
    special = SPECIAL_INPUTS.get(unet.in_channels)
    if special and unet.out_channels == latent_channels == 4:
        raise UserError(
            f"this is {special}: its U-Net has {unet.in_channels} in_channels. Only text-to-image "
            "models, with 4, are supported."
        )


def empty_unet(config: UNetConfig) -> UNet:
    """Build a U-Net whose weights take no memory yet."""
    with torch.device("meta"):
        return UNet(config)


def fill_unet(
    unet: UNet, state: Mapping[str, Tensor], where: str | Path, dtype: torch.dtype | None
) -> UNet:
    """Put weights into an empty U-Net. Raises: UserError: they do not fit."""
    place_weights(unet, state, where, dtype)
    for parameter in unet.parameters():
        parameter.requires_grad_(True)
    unet.time_proj.requires_grad_(False)
    return unet.eval()
