"""From an RGB picture to the tensor that the autoencoder sees."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentdiff.data.images import RGB, WHITE
from latentdiff.errors import choice_error

Crop = Literal["center", "random", "pad"]
#: Raise it when the pixels of `open_image` or `fit` change: cached latents are then encoded anew.
TRANSFORM_VERSION = 2


def fit(
    image: Image.Image,
    size: int | tuple[int, int],
    crop: Crop = "center",
    *,
    background: RGB = WHITE,
    generator: torch.Generator | None = None,
) -> Image.Image:
    """Bring a picture to `size` pixels without distorting it, with an antialiased Lanczos filter.

    Args:
        size: side of a square, or (height, width).
        crop: "center" or "random" cuts what sticks out; "pad" keeps all and fills with background.
        generator: source of the random position; the global one by default.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if crop == "pad":
        return _pad(image, height, width, background)
    if crop not in ("center", "random"):
        raise choice_error("crop", crop, ("center", "random", "pad"))
    scale = max(width / image.width, height / image.height)
    box_w, box_h = min(width / scale, image.width), min(height / scale, image.height)
    at = torch.rand(2, generator=generator).tolist() if crop == "random" else (0.5, 0.5)
    left = float(int((image.width - box_w) * at[0]))
    top = float(int((image.height - box_h) * at[1]))
    box = (left, top, left + box_w, top + box_h)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def to_tensor(
    image: Image.Image,
    size: int | tuple[int, int],
    crop: Crop = "center",
    *,
    background: RGB = WHITE,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fit a picture and turn it into a tensor (see `fit` for the arguments).

    Returns: float32 (3, height, width), 0 → −1 and 255 → 1.
    """
    fitted = fit(image, size, crop, background=background, generator=generator)
    pixels = torch.from_numpy(np.array(fitted.convert("RGB"), dtype=np.uint8))  # (H, W, 3)
    return pixels.permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1.0).contiguous()


def _pad(image: Image.Image, height: int, width: int, background: RGB) -> Image.Image:
    scale = min(width / image.width, height / image.height)
    inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    canvas = Image.new("RGB", (width, height), background)
    resized = image.resize(inner, Image.Resampling.LANCZOS)
    canvas.paste(resized, ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return canvas
