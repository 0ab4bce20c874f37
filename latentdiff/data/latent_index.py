"""Which stored latent belongs to which picture of a source; made block by block, then joined.

    <folder>/index-<source>-block-<k>.safetensors   a range of pictures, made by one process
    <folder>/index-<source>.safetensors             all of them; then the blocks are deleted

A block is there or not: it is written under another name and renamed, after its latents are on
disk. So any number of processes can make blocks without talking to each other, a killed one loses
at most its unfinished block, and whoever finds all blocks complete joins them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from latentdiff.atomic import atomic_file
from latentdiff.data.latent_store import Array, LatentStore
from latentdiff.data.source import Skipped
from latentdiff.errors import UserError

#: Fewest and most pictures per block, and how many blocks a set has in between.
SMALLEST_BLOCK, LARGEST_BLOCK, BLOCKS = 256, 8192, 64


class LatentIndex(NamedTuple):
    """One entry per picture of a source."""

    places: Array
    """(N,) int16: the bucket, or −1 for a picture that cannot be read."""
    keys: Array
    """(N,) 16-byte strings: the key in that bucket's store."""
    skipped: list[Skipped]
    """(name, reason) of the unreadable ones, in order."""

    def is_stored(self, stores: Sequence[LatentStore]) -> bool:
        """Whether every usable picture's latent is there."""
        if not len(self.places) or int(self.places.max()) >= len(stores):
            return not len(self.places)
        return all(
            bool(store.has(self.keys[self.places == place]).all())
            for place, store in enumerate(stores)
        )


class IndexFiles:
    """The index of one source in one cache folder.

    Args:
        folder: of the latents.
        source: the source's fingerprint, as a word that fits a file name.
        count: pictures of the source.
    """

    def __init__(self, folder: Path, source: str, count: int) -> None:
        self._folder, self._count = folder, count
        self._stem = f"index-{source}"
        # The number of processes may differ from run to run, so it does not enter.
        size = min(max(count // BLOCKS, SMALLEST_BLOCK), LARGEST_BLOCK)
        self.blocks = [range(n, min(n + size, count)) for n in range(0, count, size)]

    def read(self, stores: Sequence[LatentStore]) -> LatentIndex | None:
        """Read the whole index; None when there is none, or a latent that it names is missing."""
        return self._read(self._whole, self._count, stores)

    def read_block(self, number: int, stores: Sequence[LatentStore]) -> LatentIndex | None:
        """Read one block in the same way."""
        return self._read(self._block(number), len(self.blocks[number]), stores)

    def write_block(self, number: int, index: LatentIndex) -> None:
        """Commit one block. Raises: UserError: the folder cannot be written."""
        _write(self._block(number), index)

    def join(self, stores: Sequence[LatentStore]) -> LatentIndex | None:
        """Make the whole index from its blocks; None while some block is missing.

        Several processes may do so at once: they write the same bytes.
        """
        found = [self.read_block(number, stores) for number in range(len(self.blocks))]
        blocks = [block for block in found if block is not None]
        if len(blocks) < len(found):
            return self.read(stores)  # another process has joined, and deleted, them
        index = LatentIndex(
            np.concatenate([block.places for block in blocks]),
            np.concatenate([block.keys for block in blocks]),
            [skipped for block in blocks for skipped in block.skipped],
        )
        _write(self._whole, index)
        for number in range(len(self.blocks)):
            self._block(number).unlink(missing_ok=True)
        return index

    def missing(self, stores: Sequence[LatentStore]) -> int:
        """How many blocks are not complete."""
        return sum(self.read_block(n, stores) is None for n in range(len(self.blocks)))

    @property
    def _whole(self) -> Path:
        return self._folder / f"{self._stem}.safetensors"

    def _block(self, number: int) -> Path:
        return self._folder / f"{self._stem}-block-{number}.safetensors"

    @staticmethod
    def _read(file: Path, count: int, stores: Sequence[LatentStore]) -> LatentIndex | None:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            tensors = load(file.read_bytes())
            keys = np.ascontiguousarray(tensors["keys"]).reshape(-1).view("S16")
            skipped = json.loads(bytes(tensors["skipped"]))
            index = LatentIndex(tensors["places"], keys, [(name, why) for name, why in skipped])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None
        whole = len(index.places) == len(index.keys) == count
        return index if whole and index.is_stored(stores) else None


def write_whole(file: Path, data: bytes) -> None:
    """Write a file so that others see the old one or the new one. Raises: UserError."""
    try:
        with atomic_file(file) as new, open(new, "wb") as target:
            target.write(data)
            target.flush()
            os.fsync(target.fileno())
    except OSError as error:
        raise UserError(
            f"the latent cache cannot be written to {file.parent} ({error}). "
            "Choose another folder or free the disk."
        ) from error


def _write(file: Path, index: LatentIndex) -> None:
    from safetensors.numpy import save

    text = json.dumps([list(item) for item in index.skipped]).encode()
    tensors: dict[str, Any] = {
        "places": index.places.astype(np.int16),
        "keys": np.ascontiguousarray(index.keys).view(np.uint8).reshape(-1, 16),
        "skipped": np.frombuffer(text, np.uint8),
    }
    write_whole(file, save(tensors))
