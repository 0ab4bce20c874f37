"""What stands on a plain ground: how many objects, in which colour, and one cut out.

An object is what differs from the ground, the median colour of the image's outer ring; parts of it
that lie close together are one object.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

#: Width of the outer ring and reach of what is close together, shares of the image's side.
RING, CLOSE = 6 / 128, 3 / 128
#: Colours further apart than this differ (Euclidean, channels 0 … 255).
APART = 60.0
#: Least area of an object, a share of the image's.
LEAST = 0.005
#: Colour word → hue in degrees.
HUES = {"red": 0, "orange": 28, "yellow": 52, "green": 125, "blue": 215, "purple": 278, "pink": 330}


def ground_colour(image: Image.Image) -> Tensor:
    """Median colour of the outer ring, (3,) in 0 … 255."""
    pixels = _pixels(image)
    width = max(1, round(RING * image.width))
    inner = torch.zeros(pixels.shape[:2], dtype=torch.bool)
    inner[width:-width, width:-width] = True
    return pixels[~inner].median(0).values


def objects(image: Image.Image) -> Tensor:
    """The masks of an image's objects, (N, H, W), the largest first."""
    mask = (_pixels(image) - ground_colour(image)).norm(dim=2) > APART
    reach = 2 * round(CLOSE * image.width / 2) + 1
    near = F.max_pool2d(mask[None].float(), reach, 1, reach // 2)[0]
    labels = (torch.arange(1, near.numel() + 1).view(near.shape) * near)[None]
    while True:  # each pixel takes the largest label that it touches, until none changes
        grown = F.max_pool2d(labels, 3, 1, 1) * near
        if torch.equal(grown, labels):
            break
        labels = grown
    names, areas = (labels[0] * mask).unique(return_counts=True)
    kept = (names > 0) & (areas >= LEAST * mask.numel())
    order = areas[kept].argsort(descending=True, stable=True)
    return (labels == names[kept][order][:, None, None]) & mask


def cut_out(image: Image.Image, side: int = 128) -> Image.Image:
    """All objects together, centred and as large as fits on a white square of `side` pixels."""
    found = objects(image)
    white = Image.new("RGB", (side, side), "white")
    if not len(found):
        return white
    mask = Image.fromarray((found.any(0).numpy() * 255).astype(np.uint8))
    box = mask.getbbox()
    assert box is not None  # an object has pixels
    plain = Image.composite(image.convert("RGB"), Image.new("RGB", image.size, "white"), mask)
    room = 0.9 * side / max(box[2] - box[0], box[3] - box[1])
    size = (max(1, round((box[2] - box[0]) * room)), max(1, round((box[3] - box[1]) * room)))
    part = plain.crop(box).resize(size, Image.Resampling.BICUBIC)
    white.paste(part, ((side - size[0]) // 2, (side - size[1]) // 2))
    return white


def colour_word(image: Image.Image) -> str | None:
    """The word in `HUES` nearest to the median hue of the objects' coloured pixels.

    Returns: None where less than a tenth of the objects is coloured.
    """
    mask = objects(image).any(0).numpy()
    h, s, v = np.asarray(image.convert("RGB").convert("HSV")).transpose(2, 0, 1)[:, mask]
    coloured = (s > 60) & (v > 50)
    if coloured.sum() < max(1, 0.1 * mask.sum()):
        return None
    hues = h[coloured] * (360 / 256)
    # Hues are on a circle: the median of the distances from their mean direction.
    middle = np.degrees(np.angle(np.exp(1j * np.radians(hues)).mean()))
    median = middle + np.median(_turn(hues - middle))
    return min(HUES, key=lambda word: abs(float(_turn(median - HUES[word]))))


def halves(image: Image.Image) -> tuple[Image.Image, Image.Image]:
    """The left and the right half."""
    middle = image.width // 2
    return (
        image.crop((0, 0, middle, image.height)),
        image.crop((middle, 0, image.width, image.height)),
    )


def _turn(degrees: np.ndarray | float) -> np.ndarray:
    """The same angle in −180 … 180."""
    return (np.asarray(degrees) + 180) % 360 - 180


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).float()
