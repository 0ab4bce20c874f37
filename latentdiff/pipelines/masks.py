"""Masks: where to paint (1) and what to keep (0), in pixels and in latents."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.diffusion.guidance.measurement import conjugate_gradients
from latentdiff.pipelines.image_inputs import GivenImages


def widened(mask: Tensor, blur: int) -> Tensor:
    """A mask with a soft border outside of itself.

    Widened by `blur` pixels and blurred by a Gaussian of half that deviation, cut off there: as it
    was within, and 0 beyond 2·blur pixels in each direction.

    Args:    mask: (N, 1, H, W) in 0 … 1.
    """
    if blur == 0:
        return mask
    offsets = torch.arange(-blur, blur + 1, dtype=torch.float32)
    weights = torch.exp(-2 * (offsets / blur) ** 2)
    weights = weights / weights.sum()
    for shape in ((-1, 1), (1, -1)):
        kernel = weights.reshape(1, 1, *shape)
        height, width = kernel.shape[-2:]
        padding = (width // 2, width // 2, height // 2, height // 2)
        mask = F.max_pool2d(F.pad(mask, padding, mode="replicate"), (height, width), stride=1)
        mask = F.conv2d(F.pad(mask, padding, mode="replicate"), kernel)
    return mask.clamp(0, 1)


def surrounded(images: Tensor, mask: Tensor) -> Tensor:
    """Images with what is masked replaced by the colours around it, coarser further inside.

    What is known is averaged over 2 × 2 pixels until all is, and enlarged again level by level.

    Args:    images: (N, C, H, W).  mask: (N, 1, H, W) in 0 … 1, the share to replace.
    Source:  Gortler et al. 1996, section 3.4 (pull-push), doi:10.1145/237170.237200.
    """
    if bool((mask == 0).all()) or max(mask.shape[-2:]) == 1:
        return images
    known = 1 - mask
    weight = F.avg_pool2d(known, 2, ceil_mode=True)
    coarse = F.avg_pool2d(images * known, 2, ceil_mode=True) / weight.clamp(min=1e-6)
    coarse = surrounded(coarse, 1 - (4 * weight).clamp(max=1))
    return known * images + mask * F.interpolate(coarse, mask.shape[-2:], mode="bilinear")


def padded(images: Tensor, multiple: int) -> Tensor:
    """Images (N, C, H, W) with their right and lower edges repeated up to a multiple."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def in_latents(mask: Tensor, downscale: int) -> Tensor:
    """Latent positions that are painted: with any pixel to paint. (N, 1, h, w) of 0 and 1."""
    return (F.max_pool2d(mask, downscale) > 0).float()


def crop_box(mask: Tensor, padding: int, shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """The part of an image to work on: what is masked and `padding` pixels around it.

    Grown to the ratio of `shape` as far as the image goes, for more surroundings and no distortion.

    Args:    mask: (N, 1, H, W), of which something is above 0.
             padding: in pixels.  shape: (height, width).
    Returns: top, left, bottom, right within the image.
    """
    sides = []
    for dim in (2, 3):
        where = mask.amax(dim=[d for d in range(4) if d != dim]).nonzero()
        low, high = int(where[0]) - padding, int(where[-1]) + 1 + padding
        sides.append((max(low, 0), min(high, mask.shape[dim])))
    scale = max((high - low) / side for (low, high), side in zip(sides, shape, strict=True))
    (top, bottom), (left, right) = (
        _grown(*own, math.ceil(scale * side), most)
        for own, side, most in zip(sides, shape, mask.shape[2:], strict=True)
    )
    return top, left, bottom, right


def _grown(low: int, high: int, length: int, most: int) -> tuple[int, int]:
    length = min(max(length, high - low), most)
    low = min(max(low - (length - (high - low)) // 2, 0), most - length)
    return low, low + length


def matched(painted: Tensor, given: Tensor, mask: Tensor, reach: float) -> Tensor:
    """What was painted, its colours shifted so that they meet what was given at the mask's border.

    The difference there is continued inwards as u with ∇²u = u/reach², which falls by e in `reach`
    pixels: the shift is smooth, and details are as they were painted.

    Args:    painted, given: (N, 3, H, W).  mask: (N, 1, H, W), above 0 where painted.
    Source:  Pérez et al. 2003, eq. 4, doi:10.1145/882262.882269, with a screening term.
    """
    inside = (mask > 0).to(painted)
    border = (given - painted) * (1 - inside)

    def screened(u: Tensor) -> Tensor:
        return inside * (_minus_laplacian(inside * u) + u / reach**2)

    shift = conjugate_gradients(screened, -inside * _minus_laplacian(border), 60)
    return (painted + inside * shift).clamp(-1, 1)


def _minus_laplacian(u: Tensor) -> Tensor:
    """Of each pixel four times itself less its neighbours; it has no slope at the image's edges."""
    wide = F.pad(u, (1, 1, 1, 1), mode="replicate")
    rows, columns = wide[..., 1:-1], wide[..., 1:-1, :]
    return 4 * u - rows[..., 2:, :] - rows[..., :-2, :] - columns[..., 2:] - columns[..., :-2]


def composite(painted: Tensor, inputs: GivenImages, mask: Tensor) -> Tensor:
    """What was painted, over what was given; exactly that where the mask is 0.

    Args:    painted: (N, 3, H, W) in [−1, 1].  mask: (N, 1, H, W), the share of `painted`.
    Returns: (N, 3, H, W), or with opacity (N, 4, H, W) where the images have it.
    """
    opacity = 1 - inputs.clear
    whole = mask + opacity * (1 - mask)
    given = inputs.given[:, :3]
    colours = (mask * painted + (1 - mask) * opacity * given) / whole.clamp(min=1e-6)
    over = torch.cat([colours, 2 * whole - 1], dim=1)[:, : inputs.given.shape[1]]
    return torch.where(mask > 0, over, inputs.given)
