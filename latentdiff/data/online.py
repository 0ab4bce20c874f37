"""Pictures encoded at the step that needs them: no cache, for sets larger than the disk.

Slower than cached latents by the time of the encoder, and equal to them up to the 16 bits in which
those are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from latentdiff.data.images import UnreadableImage
from latentdiff.data.latents import (
    Shape,
    Stored,
    cache_key,
    check_sizes,
    digest,
    encode_moments,
    float_type,
)
from latentdiff.data.masks import latent_mask
from latentdiff.data.source import DataConfig, Example, Skipped, Source, group_of, problems_of
from latentdiff.data.transforms import to_tensor
from latentdiff.errors import UserError


class OnlineEncoder:
    """Turns examples into moments and loss masks.

    Attributes: shape: (2C, h, w) of the moments.
    Raises: UserError: buckets, which need the sizes of all pictures beforehand; a size that the
        autoencoder cannot take.
    """

    def __init__(
        self, autoencoder: Any, config: DataConfig, device: str | torch.device = "cpu"
    ) -> None:
        if config.buckets:
            raise UserError(
                "data.buckets=true needs the latent cache: set latents.online=false (and "
                "data.streaming=false), or data.buckets=false."
            )
        self._size = (config.image_size, config.image_size)
        check_sizes(autoencoder, (self._size,))
        self._autoencoder, self._config, self._device = autoencoder.to(device), config, device
        blank = torch.zeros(1, 3, *self._size, device=device, dtype=float_type(autoencoder))
        channels, height, width = encode_moments(autoencoder, blank).shape[1:]
        self.shape: Shape = (channels, height, width)
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="decode")

    def __call__(self, examples: Sequence[Example | None], seeds: Sequence[int]) -> Stored:
        """Encode examples; None stands for one that cannot be read, which counts nowhere.

        Args:    seeds: one per example, for crop "random".
        """
        made = list(self._pool.map(self._prepare, examples, seeds))
        images = torch.stack([image for image, _ in made])
        moments = encode_moments(
            self._autoencoder, images.to(self._device, float_type(self._autoencoder))
        )
        if self._config.loss_mask == "none" and all(e is not None for e in examples):
            return Stored(moments.float(), None)
        return Stored(moments.float(), torch.stack([mask for _, mask in made])[:, None])

    def _prepare(self, example: Example | None, seed: int) -> tuple[Tensor, Tensor]:
        latent, config = self.shape[1:], self._config
        if example is None:
            return torch.zeros(3, *self._size), torch.zeros(latent)
        generator = torch.Generator().manual_seed(seed)
        pixels = to_tensor(
            example.image,
            self._size,
            config.crop,
            background=config.background,
            generator=generator,
        )
        if config.loss_mask == "none":
            return pixels, torch.ones(latent)
        return pixels, self._mask(example, seed, latent)

    def _mask(self, example: Example, seed: int, latent: tuple[int, int]) -> Tensor:
        # The same seed again: the mask is cut where the picture was.
        generator = torch.Generator().manual_seed(seed)
        picture, crop = example.image.size, self._config.crop
        return latent_mask(example.mask, picture, self._size, crop, latent, generator)


class OnlineLatents:
    """Reads like `LatentCache`; every read decodes and encodes.

    A picture that cannot be read is met with a mask of zeros: it changes nothing.
    """

    def __init__(
        self,
        source: Source,
        autoencoder: Any,
        config: DataConfig,
        device: str | torch.device = "cpu",
    ) -> None:
        self._source, self._encode = source, OnlineEncoder(autoencoder, config, device)
        self.shape = self._encode.shape
        self.skipped: list[Skipped] = problems_of(source)
        self._fingerprint = digest("online", source.fingerprint(), cache_key(autoencoder, config))

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: Sequence[int], seeds: Sequence[int] = ()) -> Stored:
        """Encode many at once; seeds (all 0 by default) place random crops."""
        examples = [self._example(int(index)) for index in indices]
        return self._encode(examples, seeds or [0] * len(examples))

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of one picture."""
        return self._source.captions(index)

    def name(self, index: int) -> str:
        """Return the name of one picture."""
        return self._source.name(index)

    def group(self, index: int) -> str:
        """Return the key that `split` keeps together."""
        return group_of(self._source, index)

    def fingerprint(self) -> str:
        """Hash pictures, transform and autoencoder."""
        return self._fingerprint

    def _example(self, index: int) -> Example | None:
        try:
            return self._source[index]
        except UnreadableImage:
            return None
