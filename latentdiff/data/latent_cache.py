"""Latents are encoded once and kept; captions are never part of what is kept.

The autoencoder is frozen while the U-Net trains, so its output for a picture is always the same
and is stored as the moments (mean and log-variance) of q(z|x). A row's key is the picture's
content; a folder per (autoencoder weights, transform) holds the rows (latent_folder, latent_store)
and an index per source (latent_index). So a second run encodes nothing, one changed picture is one
new row, and new captions cost nothing.

Training fills the cache as it starts (the main process of each machine builds while the others
wait), or finds it filled: cache_latents.py does that, on any number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentdiff.data.latent_encoding import Encoding, digest, index_files
from latentdiff.data.latent_folder import LatentFolder
from latentdiff.data.latent_index import LatentIndex
from latentdiff.data.source import DataConfig, Skipped, Source, group_of, problems_of
from latentdiff.errors import UserError


class Stored(NamedTuple):
    """Some pictures of one shape as they are kept."""

    moments: Tensor
    """(B, 2C, h, w) float16."""
    mask: Tensor | None
    """(B, 1, h, w) float16 in [0, 1], what counts in the loss; None where all does."""


class LatentCache:
    """The usable pictures of a source as stored moments, with the captions the source has now.

    Attributes:
        skipped: (name, reason) of every picture left out.
        source_indices: which picture of the source each entry is.
        buckets: number of each entry's shape, into `shapes`.
        shapes: (2C, h, w) of each bucket.
        masked: whether there are loss masks.
        shape: that of the fullest bucket; of all entries where there are no buckets.
    """

    def __init__(
        self, source: Source, folder: LatentFolder, index: LatentIndex, skipped: list[Skipped]
    ) -> None:
        self.skipped, self.shapes = skipped, folder.shapes
        self.source_indices = np.flatnonzero(index.places >= 0)
        self.buckets = index.places[self.source_indices]
        keys = index.keys[self.source_indices]
        self._source, self._stores, self.masked = source, folder.stores, folder.masked
        self._rows = np.empty(len(keys), np.int64)
        for bucket, store in enumerate(folder.stores):
            here = self.buckets == bucket
            self._rows[here] = store.rows(keys[here])
        self.shape = self.shapes[int(np.bincount(self.buckets).argmax())]
        raw = keys.tobytes()
        words = "\n".join(raw[n : n + 16].hex() for n in range(0, len(raw), 16))
        self._fingerprint = digest(words, folder.path.name)

    def __len__(self) -> int:
        return len(self.source_indices)

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[str, ...], str]:
        """Return (moments float16 (2C, h, w), captions, name)."""
        return self.moments_of([index])[0], self.captions(index), self.name(index)

    def read(self, indices: Sequence[int] | Tensor, seeds: Sequence[int] = ()) -> Stored:
        """Read entries of one shape, in the order asked for; nothing about them is random.

        Raises: ValueError: entries of several shapes.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        buckets = self.buckets[wanted]
        if (buckets != buckets[0]).any():
            raise ValueError("a batch of latents must come from one bucket")
        rows = self._stores[int(buckets[0])].read(self._rows[wanted])
        return Stored(rows[:, :-1], rows[:, -1:]) if self.masked else Stored(rows, None)

    def moments_of(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Read the moments alone: float16 (B, 2C, h, w)."""
        return self.read(indices).moments

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of one picture."""
        return self._source.captions(int(self.source_indices[index]))

    def name(self, index: int) -> str:
        """Return the name of one picture."""
        return self._source.name(int(self.source_indices[index]))

    def group(self, index: int) -> str:
        """Return the key that `split` keeps together."""
        return group_of(self._source, int(self.source_indices[index]))

    def fingerprint(self) -> str:
        """Hash pictures, transform and autoencoder: equal means equal moments in equal order."""
        return self._fingerprint


def build_latent_cache(
    source: Source,
    autoencoder: Any,
    config: DataConfig,
    cache_dir: str | Path,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    progress: bool = True,
    threads: int = 4,
) -> LatentCache:
    """Encode what is not stored yet and return all of it.

    Args:
        source: the pictures; unreadable ones are skipped and listed in `.skipped`.
        autoencoder: has encode_moments(images (B, 3, H, W) in [-1, 1]) -> (B, 2C, h, w) and
            state_dict(); it is moved to `device`.
        config: image_size, buckets, crop, background and loss_mask are used.
        threads: how many pictures are decoded at a time.
    Raises: UserError: crop "random", unwritable folder, moments that are not finite, no usable
        picture.
    """
    autoencoder.to(device)
    folder = LatentFolder(cache_dir, autoencoder, config, device)
    files = index_files(source, folder)
    index = files.read(folder.stores)
    if index is None:
        where = torch.device(device)
        work = Encoding(source, autoencoder, config, folder, where, batch_size, threads)
        work.run(progress=progress)
        index = files.join(folder.stores)
    if index is None:
        raise UserError(
            f"the latents just written to {folder.path} cannot be read back. Is the disk full, or "
            "does another process delete them?"
        )
    skipped = [*problems_of(source), *index.skipped]
    if not bool((index.places >= 0).any()):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped[:5])
        raise UserError(f"0 usable images: none of {len(source)} could be read ({reasons}).")
    return LatentCache(source, folder, index, skipped)
