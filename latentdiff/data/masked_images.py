"""What an inpainting model is shown: images with a part masked, at random or by their own masks.

A mask is a pure function of the sample's seed, so a resumed run meets the same ones. A quarter of
them cover the whole image, as in the training of Stable Diffusion's inpainting model: so it still
draws from the prompt alone. The others are, equally often, boxes, brush strokes, or borders such as
outpainting has. For an image with a mask of its own (data.inpaint_mask), half of the others are it.

The latents of a masked image depend on the mask, so the latent cache cannot hold them: they are
encoded with each batch, which adds 24 % (embedded model) to 46 % (Stable Diffusion 1.x) to the
FLOPs of a step. A cache of K masks per image would save that, take about K times the room of half
its moments, and bound the masks that are ever met. x_0 still comes from the cache.

Source: Suvorov et al. 2021, arXiv:2109.07161, section 3.3 (wide strokes and boxes; here in shares
of the image's sides); the quarter: model card of runwayml/stable-diffusion-inpainting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

#: Share of the masks that cover the whole image, and of the others that are the image's own.
WHOLE, OWN = 0.25, 0.5


class MaskedImages:
    """The channels that an inpainting U-Net takes after x_t, for images of a data set.

    Args: autoencoder: has encode_masked, see `Autoencoder`.
    """

    def __init__(self, autoencoder: Any) -> None:
        self._autoencoder = autoencoder

    @torch.no_grad()
    def __call__(self, data: Any, indices: Sequence[int], seeds: Sequence[int]) -> Tensor:
        """Mask and latents of the masked image, (B, 1 + C, h, w) where the autoencoder is.

        Args:    data: latents whose `pixels(indices, seeds)` gives (image (3, H, W) in [−1, 1],
                 its own mask (H, W) or None) for each.
                 seeds: one per image; they place random crops and decide the masks.
        """
        images, own = zip(*data.pixels(indices, seeds), strict=True)
        masks = [
            draw_mask(seed, image.shape[1:], mask)
            for seed, image, mask in zip(seeds, images, own, strict=True)
        ]
        device = self._autoencoder.device
        whole, masked = torch.stack(images).to(device), torch.stack(masks).to(device)
        return self._autoencoder.encode_masked(whole, masked[:, None])


def draw_mask(seed: int, size: tuple[int, int], own: Tensor | None = None) -> Tensor:
    """The mask of one sample.

    Args:    seed: of the sample.  size: (height, width) in pixels.
             own: (height, width) bool, the image's own; None: it has none.
    Returns: (height, width) bool, True where the image is to be painted; somewhere it is, unless
             `own` is empty.
    """
    random = Random(f"mask {seed}")
    if random.random() < WHOLE:
        return torch.ones(size, dtype=torch.bool)
    if own is not None and random.random() < OWN:
        return own
    canvas = Image.new("1", (size[1], size[0]))
    random.choice((_boxes, _strokes, _borders))(random, ImageDraw.Draw(canvas), canvas.size)
    return torch.from_numpy(np.array(canvas))


def _boxes(random: Random, draw: ImageDraw.ImageDraw, size: tuple[int, int]) -> None:
    for _ in range(random.randint(1, 4)):
        sides = [random.uniform(0.1, 0.5) for _ in size]
        start = [random.uniform(0, 1 - side) for side in sides]
        end = [a + side for a, side in zip(start, sides, strict=True)]
        draw.rectangle(_pixels(start, size) + _pixels(end, size), fill=1)


def _strokes(random: Random, draw: ImageDraw.ImageDraw, size: tuple[int, int]) -> None:
    """Chains of lines with round joints; no turn is above 90°, as when one paints by hand."""
    for _ in range(random.randint(1, 4)):
        radius, angle = random.uniform(0.04, 0.12) * min(size), random.uniform(0, 2 * math.pi)
        x, y = random.random(), random.random()
        chain = [_pixels((x, y), size)]
        for _ in range(random.randint(2, 8)):
            angle, length = angle + random.uniform(-1.5, 1.5), random.uniform(0.05, 0.3)
            x = min(max(x + length * math.cos(angle), 0), 1)
            y = min(max(y + length * math.sin(angle), 0), 1)
            chain.append(_pixels((x, y), size))
        draw.line(chain, fill=1, width=round(2 * radius))
        for u, v in chain:
            draw.ellipse((u - radius, v - radius, u + radius, v + radius), fill=1)


def _borders(random: Random, draw: ImageDraw.ImageDraw, size: tuple[int, int]) -> None:
    """One to four sides; between opposite ones at least a fifth of the image is kept."""
    sides = random.sample(
        [(axis, far) for axis in (0, 1) for far in (False, True)], k=random.randint(1, 4)
    )
    for axis, far in sides:
        depth = random.uniform(0.1, 0.4 if (axis, not far) in sides else 0.6)
        start, end = [0.0, 0.0], [1.0, 1.0]
        start[axis], end[axis] = (1 - depth, 1.0) if far else (0.0, depth)
        draw.rectangle(_pixels(start, size) + _pixels(end, size), fill=1)


def _pixels(point: Sequence[float], size: tuple[int, int]) -> tuple[float, float]:
    """Shares of (width, height) as pixels."""
    return point[0] * (size[0] - 1), point[1] * (size[1] - 1)
