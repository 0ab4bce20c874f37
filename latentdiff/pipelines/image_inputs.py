"""The images and masks that users give: read as a viewer shows them, and checked.

EXIF rotation is applied, grey, palette, 16-bit and CMYK become RGB, transparency is kept beside the
colours. Files and Pillow images are treated alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentdiff.data.images import Source, UnreadableImage, decode, to_grey, to_srgb
from latentdiff.errors import UserError
from latentdiff.pipelines.inputs import check_pixels, for_each

#: One image or several: files, Pillow images, or a tensor in 0 … 1.
ImageInput = Source | Sequence[Source] | Tensor
SOURCES = (str, os.PathLike, bytes, Image.Image)


@dataclass(frozen=True)
class GivenImages:
    """Images of one size."""

    given: Tensor
    """(N, 3 or 4, H, W) in [−1, 1]: the colours, also where nothing shows, and the opacity if some
    may be transparent."""

    @property
    def rgb(self) -> Tensor:
        """(N, 3, H, W) in [−1, 1]: as networks see them, transparency over white."""
        opacity = 1 - self.clear
        return self.given[:, :3] * opacity + 1 - opacity

    @property
    def clear(self) -> Tensor:
        """(N, 1, H, W) in 0 … 1: how transparent they are."""
        if self.given.shape[1] == 3:
            return torch.zeros_like(self.given[:, :1])
        return (1 - self.given[:, 3:]) / 2

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        height, width = self.given.shape[-2:]
        return height, width

    def __len__(self) -> int:
        return len(self.given)


def read_images(image: ImageInput, name: str = "image") -> GivenImages:
    """Read images.

    Args:    image: a file, a Pillow image, several of one size, or a tensor (N, 3 or 4, H, W) or
             (3 or 4, H, W) in 0 … 1.
             name: how messages call it.
    Raises:  UserError: none of these; unreadable, animated, too large, or of several sizes.
    """
    if isinstance(image, Tensor):
        return GivenImages(_checked(image, (3, 4), name) * 2 - 1)
    images = decoded_images(image, name, to_srgb)
    sizes = sorted({one.size for one in images})
    if len(sizes) > 1:
        raise UserError(
            f"the images of one call must have one size; {name} has "
            f"{' and '.join(_size(one) for one in sizes[:3])}. Give them one by one."
        )
    mode = "RGBA" if any(one.mode == "RGBA" for one in images) else "RGB"
    return GivenImages(torch.stack([_pixels(one.convert(mode)) for one in images]) / 127.5 - 1)


def read_masks(mask: ImageInput, size: tuple[int, int], count: int) -> Tensor:
    """Read masks: white where to paint, black where to keep, grey in between; clear is black.

    A mask of another size and the same ratio is enlarged by repeating pixels, or averaged down.

    Args:    mask: as `image` of `read_images`, tensors with one channel or none.
             size: (height, width) of the images.  count: how many there are.
    Returns: (count, 1, height, width) in 0 … 1.
    Raises:  UserError: see `read_images`; another aspect ratio; nothing to paint.
    """
    if isinstance(mask, Tensor):
        channels = mask[None] if mask.ndim == 2 else mask
        unit = (_checked(channels, (1,), "mask_image") * 255).round().byte().cpu()
        images = [Image.fromarray(one.numpy()) for one in unit[:, 0]]
    else:
        images = decoded_images(mask, "mask_image", to_grey)
    stretched = [_stretched(one, size) for one in images]
    for one in stretched:
        if not one.getextrema()[1]:
            raise UserError(
                "mask_image is black everywhere, so there is nothing to paint. White marks what is "
                "painted anew, black what is kept."
            )
    masks = for_each(stretched, count, "mask_image", "mask", "images")
    return torch.stack([_pixels(one) for one in masks]) / 255


def decoded_images(
    image: Any, name: str, use: Callable[[Image.Image], Image.Image]
) -> list[Image.Image]:
    """What `use` makes of each image, upright. Raises: UserError: see `read_images`."""
    images = [image] if isinstance(image, SOURCES) else image
    if (
        not isinstance(images, Sequence)
        or not images
        or not all(isinstance(one, SOURCES) for one in images)
    ):
        raise UserError(
            f"{name} must be an image file, a PIL image, a list of them or a tensor; got "
            f"{image!r:.200}."
        )

    def check(one: Image.Image) -> None:
        check_pixels(one.height, one.width, f"{name}'s size")
        # A phone's JPEG may hold a second image, of depth or brightness (MPO).
        if getattr(one, "is_animated", False) and one.format != "MPO":
            raise UserError(
                f"{name} must be one image; {getattr(one, 'filename', '') or 'it'} has "
                f"{one.n_frames} frames or pages. Take one out of it, as by seek(k) and copy() "  # type: ignore[attr-defined]
                "in Pillow."
            )

    try:
        held = [name if isinstance(one, bytes | Image.Image) else None for one in images]
        return [decode(one, of, use, check) for one, of in zip(images, held, strict=True)]
    except UnreadableImage as error:
        raise UserError(f"{name} cannot be read: {error}.") from error


def _checked(images: Tensor, channels: tuple[int, ...], name: str) -> Tensor:
    """(N, C, H, W) in 0 … 1 in float32. Raises: UserError."""
    batch = images[None] if images.ndim == 3 else images
    if batch.ndim != 4 or batch.shape[1] not in channels or not batch.numel():
        raise UserError(
            f"{name} as a tensor must be (N, {' or '.join(map(str, channels))}, height, width); "
            f"got {tuple(images.shape)}."
        )
    check_pixels(batch.shape[2], batch.shape[3], f"{name}'s size")
    batch = batch.float()
    if not (batch.min() >= 0 and batch.max() <= 1):  # NaN is neither
        raise UserError(
            f"{name} as a tensor must lie in 0 … 1; got {float(batch.min()):.3g} … "
            f"{float(batch.max()):.3g}."
        )
    return batch


def _stretched(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    # A side may have been rounded, by less than one of its pixels.
    if abs(mask.width * height - mask.height * width) >= max(size):
        raise UserError(
            f"mask_image must have the shape of the image, {_size((width, height))} (width x "
            f"height) or that ratio; got {_size(mask.size)}."
        )
    return mask.resize((width, height), Image.Resampling.BOX)


def _pixels(image: Image.Image) -> Tensor:
    """(C, H, W) of 0 … 255 in float32."""
    pixels = np.atleast_3d(np.array(image, dtype=np.uint8))
    return torch.from_numpy(pixels).permute(2, 0, 1).float()


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
