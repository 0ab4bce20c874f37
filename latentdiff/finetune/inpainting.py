"""Inpainting: a U-Net that is given what of an image is kept, beside the noisy latents.

    y = unet([x_t, m, E((1 − m) x)], t, context)       m: 1 where the image is to be painted

A text-to-image U-Net becomes one by 1 + C more input channels of its first convolution, whose
weights are zero: the first step finds the model that it was. Then all weights are trained by the
plain loss. Which masks it meets: `data.masked_images`. Any other method trains such a U-Net too
and leaves its inputs as they are.

Source: Rombach et al. 2022, section 4.5, arXiv:2112.10752; model card of
runwayml/stable-diffusion-inpainting.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn
from torch.nn import functional as F

from latentdiff.finetune.full import Full, FullConfig

if TYPE_CHECKING:
    from latentdiff.formats.folder import Components
    from latentdiff.models.unet import UNet


@dataclass(frozen=True)
class InpaintingConfig:
    """All weights of an inpainting U-Net are trained, which a text-to-image U-Net becomes."""

    kind: Literal["inpainting"] = "inpainting"
    """inpainting: as full, of a U-Net that is also given a mask and the masked image; one for text
    to image is widened. The run ends with a model folder."""


class Inpainting(Full):
    """The U-Net, widened where it is not an inpainting one yet."""

    def __init__(self, components: Components, config: InpaintingConfig) -> None:
        widen(components.unet)
        super().__init__(components, FullConfig())


def widen(unet: UNet) -> None:
    """Make a text-to-image U-Net an inpainting one, in place; its output stays what it was."""
    if unet.config.inpaints:
        return
    more, conv = unet.config.out_channels + 1, unet.conv_in
    unet.config = dataclasses.replace(unet.config, in_channels=conv.in_channels + more)
    conv.weight = nn.Parameter(F.pad(conv.weight.detach(), (0, 0, 0, 0, 0, more)))
    conv.in_channels += more
