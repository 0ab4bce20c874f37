"""Aspect-ratio buckets: a few image shapes of about the same area, and which image goes where.

A tall image that is cut to a square loses its head and feet. With buckets it is cut to the
nearest of some shapes instead; a batch holds images of one shape, so that tensors stay whole.

Then image and loss mask become what the diffusion model trains on: q(z|x) and weights.

    image, mask ─crop, resize─> pixels (3, H, W), weights (h, w)      `prepare`, in threads
    pixels ─autoencoder─> mean and log-variance of q(z|x), (2C, h, w)  `__call__`, in batches

Cached and online latents both go through here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentdiff.data.images import TRANSFORM_VERSION, latent_mask, to_tensor
from latentdiff.data.source import DataConfig, Example
from latentdiff.weights import raw_bytes

Size = tuple[int, int]


def bucket_sizes(size: int, step: int, max_ratio: float) -> tuple[Size, ...]:
    """All (height, width) in multiples of `step` that hold as much of size² pixels as they can.

    For each width the largest height with h·w ≤ size² is taken, and the same turned on its side;
    shapes longer than `max_ratio` are left out. For size 512, step 64 and ratio 2 these are,
    heights first, 640×384, 576×448, 512×512, 448×576, 384×640.

    Returns: from the tallest to the widest.
    """
    found: set[Size] = set()
    for short in range(step, size + 1, step):
        long = size * size // short // step * step
        if long <= max_ratio * short:
            found |= {(long, short), (short, long)}
    return tuple(sorted(found, key=lambda shape: (-shape[0] / shape[1], shape)))


def sizes_of(config: DataConfig) -> tuple[Size, ...]:
    """The (height, width) that images of a configuration may be brought to."""
    if not config.buckets:
        return ((config.image_size, config.image_size),)
    step, ratio = config.bucket_step, config.bucket_max_ratio
    usual = bucket_sizes(config.image_size, step, ratio)
    if not config.no_upscale:
        return usual
    sides = range(step, max(map(max, usual)) + 1, step)
    smaller = [
        (h, w)
        for h in sides
        for w in sides
        if max(h, w) <= ratio * min(h, w) and h * w <= config.image_size**2
    ]
    return (*usual, *(size for size in smaller if size not in usual))


def usual_sizes(config: DataConfig) -> int | None:
    """How many of `sizes_of`, the first ones, are for all images; None: all of them."""
    if not config.no_upscale:
        return None
    return len(sizes_of(dataclasses.replace(config, no_upscale=False)))


def covers(size: Size, width: int, height: int) -> bool:
    """Whether an image can be brought to a (height, width) without being enlarged."""
    return size[0] <= height and size[1] <= width


def nearest(sizes: Sequence[Size], width: int, height: int, usual: int | None = None) -> int:
    """Which of some (height, width) an image goes to: the nearest aspect ratio, on a log scale.

    Args:    usual: how many of the sizes compete; the smaller ones after them are for images that
             would be enlarged, each of which goes to the largest size that it covers. One that
             covers none is enlarged all the same.
    """
    wanted = math.log(width / height)

    def distance(i: int) -> float:
        return abs(math.log(sizes[i][1] / sizes[i][0]) - wanted)

    found = min(range(len(sizes))[:usual], key=distance)
    if usual is None or covers(sizes[found], width, height):
        return found
    covered = [i for i, size in enumerate(sizes) if covers(size, width, height)]
    if covered:
        return max(covered, key=lambda i: (sizes[i][0] * sizes[i][1], -distance(i)))
    return min(range(len(sizes)), key=lambda i: (sizes[i][0] * sizes[i][1], distance(i)))


Shape = tuple[int, int, int]


class Painting(NamedTuple):
    """An image for inpainting, of which something will be masked."""

    pixels: Tensor
    """(3, H, W) float32 in [−1, 1]."""
    mask: Tensor | None
    """(H, W) bool, what its own mask says to paint; None: it has none."""


class Encoder:
    """An autoencoder with the transform before it.

    Args:
        autoencoder: has encode_moments(images (B, 3, H, W) in [-1, 1]) -> (B, 2C, h, w) and
            state_dict(); it is moved to `device`.
        config: image_size, buckets, crop, background and loss_mask are used.
    Attributes:
        sizes: (height, width) in pixels of each bucket; one where there are no buckets.
        masked: whether examples have loss masks.
    Raises: UserError: a size that the autoencoder cannot take.
    """

    def __init__(
        self, autoencoder: Any, config: DataConfig, device: str | torch.device = "cpu"
    ) -> None:
        self.config, self.sizes, self.masked = config, sizes_of(config), config.loss_mask != "none"
        self._usual = usual_sizes(config)
        if hasattr(autoencoder, "check_image_size"):
            for size in self.sizes:
                autoencoder.check_image_size(size)
        self._autoencoder, self._device = autoencoder.to(device), device
        floats = (t.dtype for t in autoencoder.state_dict().values() if t.is_floating_point())
        self._dtype = next(floats, torch.float32)

    @cached_property
    def shapes(self) -> list[Shape]:
        """(2C, h, w) of the moments in each bucket, found by encoding one blank image."""
        channels, height, width = self(torch.zeros(1, 3, *self.sizes[0])).shape[1:]
        return self.shapes_like((channels, height, width))

    def shapes_like(self, first: Shape) -> list[Shape]:
        """The shapes of all buckets from that of the first."""
        channels, height, width = first
        down, across = self.sizes[0][0] // height, self.sizes[0][1] // width
        return [(channels, h // down, w // across) for h, w in self.sizes]

    @cached_property
    def key(self) -> str:
        """See `cache_key`."""
        return cache_key(self._autoencoder, self.config)

    def bucket(self, width: int, height: int) -> int:
        """Which of the sizes an image goes to, see `nearest`."""
        return nearest(self.sizes, width, height, self._usual)

    def prepare(
        self, example: Example, bucket: int = 0, seed: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Bring an image and its mask to the sizes of a bucket.

        Args:    seed: places random crops.
        Returns: float32 (3, H, W) in [-1, 1], and (h, w) in [0, 1]; None where all counts.
        """
        pixels = self._pixels(example, bucket, seed)
        if not self.masked:
            return pixels, None
        return pixels, self._mask(example, bucket, seed, self.shapes[bucket][1:])

    def painting(self, example: Example, bucket: int = 0, seed: int | None = None) -> Painting:
        """The same image, with its own mask for inpainting, both in pixels."""
        mask = None
        if self.config.inpaint_mask and example.mask is not None:
            mask = self._mask(example, bucket, seed, self.sizes[bucket]) >= 0.5
        return Painting(self._pixels(example, bucket, seed), mask)

    def _pixels(self, example: Example, bucket: int, seed: int | None) -> Tensor:
        size, crop, behind = self.sizes[bucket], self.config.crop, self.config.background
        place = _generator(seed)
        return to_tensor(example.image, size, crop, background=behind, generator=place)

    def _mask(self, example: Example, bucket: int, seed: int | None, size: Size) -> Tensor:
        """The mask of an image, (h, w) in [0, 1]; the same seed cuts it where the image was."""
        image_size, to, crop = example.image.size, self.sizes[bucket], self.config.crop
        return latent_mask(example.mask, image_size, to, crop, size, _generator(seed))

    def __call__(self, pixels: Tensor) -> Tensor:
        """Encode (B, 3, H, W) without gradients: moments (B, 2C, h, w) on the device."""
        with torch.no_grad():
            return self._autoencoder.encode_moments(pixels.to(self._device, self._dtype))


def _generator(seed: int | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator().manual_seed(seed)


def cache_key(autoencoder: Any, config: DataConfig) -> str:
    """Hash everything but the image that decides the moments: weights and transform."""
    transform: tuple[Any, ...] = (
        TRANSFORM_VERSION,
        config.image_size,
        config.crop,
        tuple(config.background),
    )
    if config.buckets:
        transform += ("buckets", sizes_of(config))
    if config.loss_mask != "none":
        transform += ("mask", config.loss_mask)
    found = hashlib.blake2b(repr(transform).encode(), digest_size=8)
    for name, tensor in sorted(autoencoder.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(raw_bytes(tensor))
    return found.hexdigest()
