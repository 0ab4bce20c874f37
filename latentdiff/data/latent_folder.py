"""One folder of a latent cache: everything encoded with the same weights and transform.

<cache_dir>/latents-<weights and transform>/   about.json, index files
    part-*.arrow                               the latents of squares, or
    <height>x<width>/part-*.arrow              those of one aspect-ratio bucket
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.data.buckets import sizes_of
from latentdiff.data.latent_index import write_whole
from latentdiff.data.latent_store import LatentStore
from latentdiff.data.source import DataConfig
from latentdiff.data.transforms import TRANSFORM_VERSION
from latentdiff.errors import UserError
from latentdiff.tensor_file import raw_bytes

Shape = tuple[int, int, int]


class LatentFolder:
    """The stores of all buckets of a configuration (one, where there are no buckets).

    Args:
        cache_dir: of all latent caches.
        autoencoder: what encodes; see `build_latent_cache`.
    Attributes:
        sizes: (height, width) in pixels per bucket.
        shapes: (2C, h, w) of the moments per bucket.
        masked: whether rows have a mask as their last channel.
        stores: one per bucket.
    Raises: UserError: crop random, a size the autoencoder cannot take, an unwritable folder.
    """

    def __init__(
        self, cache_dir: str | Path, autoencoder: Any, config: DataConfig, device: Any = "cpu"
    ) -> None:
        if config.crop == "random":
            raise UserError(
                "data.crop=random cannot be cached: latents are encoded once. Use center or pad, "
                "or latents.online=true, which encodes at every step."
            )
        self.sizes = sizes_of(config)
        if config.buckets and len(self.sizes) == 1:
            raise UserError(
                f"data.buckets=true gives one shape only, {self.sizes[0]}: lower data.bucket_step="
                f"{config.bucket_step} or raise data.bucket_max_ratio={config.bucket_max_ratio}."
            )
        check_sizes(autoencoder, self.sizes)
        self.masked = config.loss_mask != "none"
        self.path = Path(cache_dir) / f"latents-{cache_key(autoencoder, config)}"
        self.shapes = self._prepare(autoencoder, config, device)
        self.stores = [
            LatentStore(self.bucket_path(i), (c + self.masked, h, w))
            for i, (c, h, w) in enumerate(self.shapes)
        ]

    def bucket_path(self, number: int) -> Path:
        """Where one bucket's latents are."""
        height, width = self.sizes[number]
        return self.path / f"{height}x{width}" if len(self.sizes) > 1 else self.path

    def refresh(self) -> None:
        """Look for what other processes have written."""
        for store in self.stores:
            store.refresh()

    def bucket_of(self, key: str) -> int | None:
        """Which bucket holds a picture, or None."""
        return next((i for i, store in enumerate(self.stores) if key in store), None)

    def _prepare(self, autoencoder: Any, config: DataConfig, device: Any) -> list[Shape]:
        """Make the folders; find the moments' shapes (remembered in about.json)."""
        about = self.path / "about.json"
        try:
            for number in range(len(self.sizes)):
                self.bucket_path(number).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the latent cache cannot be written to {self.path} ({error}). "
                "Choose another folder or free the disk."
            ) from error
        if about.is_file():
            channels, height, width = json.loads(about.read_text())["moments_shape"]
        else:
            blank = torch.zeros(1, 3, *self.sizes[0], device=device, dtype=float_type(autoencoder))
            _, channels, height, width = encode_moments(autoencoder, blank).shape
            facts = {
                "moments_shape": [channels, height, width],
                "image_size": config.image_size,
                "crop": config.crop,
                "buckets": [list(size) for size in self.sizes],
            }
            write_whole(about, json.dumps(facts).encode())
        down, across = self.sizes[0][0] // height, self.sizes[0][1] // width
        return [(channels, h // down, w // across) for h, w in self.sizes]


def cache_key(autoencoder: Any, config: DataConfig) -> str:
    """Hash everything but the picture that decides the moments: weights and transform."""
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
    digest = hashlib.blake2b(repr(transform).encode(), digest_size=8)
    for name, tensor in sorted(autoencoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def check_sizes(autoencoder: Any, sizes: tuple[tuple[int, int], ...]) -> None:
    """Refuse sizes that the autoencoder cannot take. Raises: UserError."""
    if hasattr(autoencoder, "check_image_size"):
        for size in sizes:
            autoencoder.check_image_size(size)


def encode_moments(autoencoder: Any, images: Tensor) -> Tensor:
    """Moments (B, 2C, h, w) of pictures, without gradients."""
    with torch.no_grad():
        return autoencoder.encode_moments(images)


def float_type(autoencoder: Any) -> torch.dtype:
    """The number format of an autoencoder's weights."""
    floats = (t.dtype for t in autoencoder.state_dict().values() if t.is_floating_point())
    return next(floats, torch.float32)
