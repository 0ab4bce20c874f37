"""Which parts of a picture count in the loss: white ones do, black ones do not, grey ones in part.

A mask is a grey picture of the same size, from the picture's own transparency or from a file of its
own. It is cut as the picture is and kept beside the moments, averaged over the pixels that one
latent position stands for.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from latentdiff.data.transforms import Crop, to_tensor

BLACK = (0, 0, 0)


def latent_mask(
    mask: Image.Image | None,
    picture: tuple[int, int],
    size: tuple[int, int],
    crop: Crop,
    latent: tuple[int, int],
    generator: torch.Generator | None = None,
) -> Tensor:
    """A mask at latent resolution.

    Args:
        mask: of any size (it is stretched to the picture's); None counts everything.
        picture: (width, height) of the picture.
        size: (height, width) that the picture is brought to; what padding adds does not count.
        latent: (h, w) of the latents.
        generator: source of the random position, in the state that the picture's had.
    Returns: float32 (h, w) in [0, 1].
    """
    whole = mask.convert("L") if mask is not None else Image.new("L", picture, 255)
    if whole.size != picture:
        whole = whole.resize(picture, Image.Resampling.BILINEAR)
    grey = whole.convert("RGB")
    pixels = to_tensor(grey, size, crop, background=BLACK, generator=generator)[:1]  # (1, H, W), ±1
    return F.adaptive_avg_pool2d((pixels[None] + 1) / 2, latent)[0, 0].clamp(0, 1)


def stack_masks(moments: Tensor, masks: Tensor) -> Tensor:
    """Moments (B, 2C, h, w) with masks (B, h, w) as one more channel."""
    return torch.cat([moments, masks[:, None].to(moments)], dim=1)
