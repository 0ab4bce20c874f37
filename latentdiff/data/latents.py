"""Latents are encoded once and kept as safetensors shards; captions are never part of them.

    <cache_dir>/latents-<weights and transform>/
        about.json                    shape of the moments
        [<height>x<width>/]shard-<id>.safetensors
                                      keys (N, 16) uint8 and moments (N, 2C, h, w) float16
        index-<source>.safetensors    bucket and key of every image of a source

The autoencoder is frozen while the U-Net trains, so its moments (mean and log-variance of q(z|x))
of an image never change. A row's key is a hash of the image: a second run encodes nothing, one
changed image is one new row, and new captions cost nothing. With loss masks, a row's last channel
is the mask.

Work is cut into blocks of images. Process r of R encodes the unfinished blocks r, r + R, … and
writes an index file for each; it talks to no other process, and whoever finds all blocks complete
joins them. Files are renamed into place when complete, so a killed process loses one shard at most.
Rows are read with plain file reads: pages of a memory map would count as the process's own memory.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentdiff.data.encoder import Encoder, Painting, Shape
from latentdiff.data.images import UnreadableImage
from latentdiff.data.source import (
    DataConfig,
    Skipped,
    Source,
    View,
    digest,
    few,
    map_ahead,
    problems_of,
)
from latentdiff.errors import UserError
from latentdiff.files import atomic_file, read_json

_log = logging.getLogger(__name__)
Array = np.ndarray[Any, Any]
#: A shard is closed at this size; what a killed process loses is at most this much work.
SHARD_BYTES = 64 * 2**20
#: How many shards may be open at a time; systems allow 1024 files and often fewer.
OPEN_FILES = 128
#: Fewest and most images per block, and how many blocks a set has in between.
SMALLEST_BLOCK, LARGEST_BLOCK, BLOCKS = 256, 8192, 64


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
        source: the images; unreadable ones are skipped and listed in `.skipped`.
        autoencoder, config, device: see `Encoder`.
        threads: how many images are decoded at a time.
    Raises: UserError: crop "random", unwritable folder, moments that are not finite, no usable
        image.
    """
    folder = LatentFolder(cache_dir, Encoder(autoencoder, config, device))
    work = CacheBuilder(source, folder, batch_size, threads)
    work.run(progress=progress)
    index = work.index()
    if index is None:
        raise UserError(
            f"the latents just written to {folder.path} cannot be read back. Is the disk full, or "
            "does another process delete them?"
        )
    skipped = [*problems_of(source), *index.skipped]
    if not bool((index.buckets >= 0).any()):
        raise UserError(f"0 usable images: none of {len(source)} could be read ({few(skipped)}).")
    return LatentCache(source, folder, index, skipped)


class Stored(NamedTuple):
    """Some images of one shape as they are kept."""

    moments: Tensor
    """(B, 2C, h, w) float16."""
    mask: Tensor | None
    """(B, 1, h, w) float16 in [0, 1], what counts in the loss; None where all does."""


class LatentCache(View):
    """The usable images of a source as stored moments, with the captions the source has now.

    Attributes:
        skipped: (name, reason) of every image left out.
        buckets: number of each entry's shape, into `shapes`.
        shapes: (2C, h, w) of each bucket.
        shape: that of the fullest bucket; of all entries where there are no buckets.
    """

    def __init__(
        self, source: Source, folder: LatentFolder, index: LatentIndex, skipped: list[Skipped]
    ) -> None:
        usable = np.flatnonzero(index.buckets >= 0)
        super().__init__(source, usable)
        self.skipped, self.shapes = skipped, folder.shapes
        self.buckets, keys = index.buckets[usable], index.keys[usable]
        self._stores, self._masked, self._encoder = folder.stores, folder.masked, folder.encoder
        self._rows = np.empty(len(keys), np.int64)
        for bucket, store in enumerate(folder.stores):
            here = self.buckets == bucket
            self._rows[here] = store.rows(keys[here])
        self.shape = self.shapes[int(np.bincount(self.buckets).argmax())]
        raw = keys.tobytes()
        words = "\n".join(raw[n : n + 16].hex() for n in range(0, len(raw), 16))
        self._fingerprint = digest(words, folder.path.name)

    def read(self, indices: Sequence[int] | Tensor, seeds: Sequence[int] = ()) -> Stored:
        """Read entries of one shape, in the order asked for; nothing about them is random.

        Raises: ValueError: entries of several shapes.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        buckets = self.buckets[wanted]
        if (buckets != buckets[0]).any():
            raise ValueError("a batch of latents must come from one bucket")
        rows = self._stores[int(buckets[0])].read(self._rows[wanted])
        return Stored(rows[:, :-1], rows[:, -1:]) if self._masked else Stored(rows, None)

    def pixels(self, indices: Sequence[int], seeds: Sequence[int]) -> list[Painting]:
        """The images of entries of one shape, decoded anew, with their own masks for inpainting.

        Raises: UserError: one can no longer be read.
        """
        bucket = int(self.buckets[indices[0]])

        def pixels(index: int) -> Painting:
            example = self.source[int(self.source_indices[index])]
            return self._encoder.painting(example, bucket)

        try:
            return list(map_ahead(pixels, indices, 4, len(indices)))
        except UnreadableImage as error:
            raise UserError(
                f"{error}. Its latents are stored; the image is needed with a part of it masked."
            ) from error

    def fingerprint(self) -> str:
        """Hash images, transform and autoencoder: equal means equal moments in equal order."""
        return self._fingerprint


class Done(NamedTuple):
    """What one process did."""

    blocks: int
    """Blocks that it committed."""
    encoded: int
    """Images that it encoded (equal and already stored ones are not)."""


class CacheBuilder:
    """Fills a folder with the latents of a source: decodes in threads, encodes in batches.

    Args:
        batch_size: images encoded at a time.
        threads: images decoded at a time.
    Attributes: blocks: which images each block has; the same for any number of processes.
    """

    def __init__(
        self, source: Source, folder: LatentFolder, batch_size: int = 32, threads: int = 4
    ) -> None:
        self._source, self._folder = source, folder
        self._batch_size, self._threads = batch_size, threads
        self._name, count = f"index-{digest(source.fingerprint())}", len(source)
        size = min(max(count // BLOCKS, SMALLEST_BLOCK), LARGEST_BLOCK)
        self.blocks = [range(n, min(n + size, count)) for n in range(0, count, size)]

    def index(self) -> LatentIndex | None:
        """Read the whole index, or make it from its blocks; None while a block is missing.

        Several processes may do so at once: they write the same bytes.
        """
        self._folder.refresh()
        if (whole := self._whole()) is not None:
            return whole
        blocks = [b for n in range(len(self.blocks)) if (b := self._read_block(n)) is not None]
        if len(blocks) < len(self.blocks):
            return self._whole()  # another process has joined, and deleted, them
        index = LatentIndex(
            np.concatenate([block.buckets for block in blocks]),
            np.concatenate([block.keys for block in blocks]),
            [skipped for block in blocks for skipped in block.skipped],
        )
        self._folder.write_index(self._name, index)
        for number in range(len(self.blocks)):
            (self._folder.path / f"{self._block_name(number)}.safetensors").unlink(missing_ok=True)
        return index

    def missing(self) -> int:
        """How many blocks are not complete."""
        return sum(self._read_block(number) is None for number in range(len(self.blocks)))

    def run(self, rank: int = 0, ranks: int = 1, progress: bool = True) -> Done:
        """Encode this process's unfinished blocks. Raises: UserError: nothing can be written."""
        from tqdm import tqdm

        if self._whole() is not None:
            return Done(0, 0)
        mine = range(rank, len(self.blocks), ranks)
        todo = [n for n in mine if self._read_block(n) is None]
        total, encoded = sum(len(self.blocks[n]) for n in todo), 0
        _remove_stale(self._folder.path)
        with tqdm(total=total, desc="encoding latents", disable=not progress, unit="img") as bar:
            for number in todo:
                block, count = self._encode_block(self.blocks[number], bar.update)
                self._folder.refresh()  # what this block stored is not encoded again in the next
                self._folder.write_index(self._block_name(number), block)
                encoded += count
        return Done(len(todo), encoded)

    def _whole(self) -> LatentIndex | None:
        return self._folder.read_index(self._name, len(self._source))

    def _block_name(self, number: int) -> str:
        return f"{self._name}-block-{number}"

    def _read_block(self, number: int) -> LatentIndex | None:
        return self._folder.read_index(self._block_name(number), len(self.blocks[number]))

    def _encode_block(self, images: range, tick: Callable[[int], Any]) -> tuple[LatentIndex, int]:
        """Returns: the block's index, and how many images were encoded."""
        index = LatentIndex(np.full(len(images), -1, np.int16), np.zeros(len(images), "S16"), [])
        rows = [_Rows(self._folder, n, self._batch_size) for n in range(len(self._folder.sizes))]
        ahead = 2 * self._batch_size + self._threads
        try:
            for at, job in enumerate(map_ahead(self._load, images, self._threads, ahead)):
                tick(1)
                if job.problem is not None:
                    index.skipped.append(job.problem)
                    continue
                index.buckets[at], index.keys[at] = job.bucket, bytes.fromhex(job.key)
                if job.pixels is not None:
                    rows[job.bucket].add(job)
            for part in rows:
                part.encode()
        finally:  # rows stand on their own, so what was encoded before an error is kept
            for part in rows:
                part.flush()
        return index, sum(part.encoded for part in rows)

    def _load(self, number: int) -> _Job:
        """Decode an image, unless its file already says that it is stored."""
        content_key = getattr(self._source, "content_key", None)
        try:
            key = content_key(number) if content_key else None
            if key is not None and (bucket := self._folder.bucket_of(key)) is not None:
                return _Job(key, bucket)
            example = self._source[number]
        except UnreadableImage as error:
            return _Job(problem=(error.name, error.reason))
        image, mask = example.image, example.mask
        if key is None:
            masks = [mask.tobytes()] if mask is not None else []
            key = digest(image.tobytes(), repr(image.size), *masks)
            if (bucket := self._folder.bucket_of(key)) is not None:
                return _Job(key, bucket)
        bucket = self._folder.encoder.bucket(*image.size)
        return _Job(key, bucket, *self._folder.encoder.prepare(example, bucket))


class _Job(NamedTuple):
    key: str = ""
    bucket: int = -1
    pixels: Tensor | None = None
    mask: Tensor | None = None
    problem: Skipped | None = None


class _Rows:
    """Images of one bucket that wait to fill a batch, and rows that wait to fill a shard.

    Attributes: encoded: how many images were encoded.
    """

    def __init__(self, folder: LatentFolder, bucket: int, batch_size: int) -> None:
        self._place, self._encoder = folder.bucket_path(bucket), folder.encoder
        self._batch_size, self._seen, self.encoded = batch_size, set[str](), 0
        self._queue, self._keys, self._moments = list[_Job](), list[str](), list[Tensor]()

    def add(self, job: _Job) -> None:
        """Queue an image, if the same was not already; encode once they fill a batch."""
        if job.key in self._seen:
            return
        self._seen.add(job.key)
        self._queue.append(job)
        if len(self._queue) == self._batch_size:
            self.encode()

    def encode(self) -> None:
        """Encode what is queued. Raises: UserError: moments are not finite."""
        queue, self._queue = self._queue, []
        if not queue:
            return
        moments = self._encoder(torch.stack([j.pixels for j in queue if j.pixels is not None]))
        stored = moments.to("cpu", torch.float16)
        if not bool(torch.isfinite(stored).all()):
            raise UserError(
                "the autoencoder gave moments that are not finite numbers in 16 bit "
                f"(it runs in {moments.dtype}). Load it in float32; if that is so, it is broken."
            )
        if masks := [job.mask for job in queue if job.mask is not None]:
            stored = torch.cat([stored, torch.stack(masks)[:, None].to(stored)], dim=1)
        self._keys += [job.key for job in queue]
        self._moments.append(stored)
        self.encoded += len(queue)
        if sum(part.nbytes for part in self._moments) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is encoded. Raises: UserError: the folder cannot be written."""
        if self._keys:
            write_shard(self._place, self._keys, torch.cat(self._moments))
        self._keys, self._moments = [], []


def _remove_stale(folder: Path) -> None:
    """Delete what killed runs left; younger files may belong to a run that is still going."""
    for path in folder.rglob(".tmp-*"):
        try:
            if time.time() - path.stat().st_mtime > 24 * 3600:
                path.unlink()
        except OSError:
            continue


class LatentIndex(NamedTuple):
    """One entry per image of a source, or of one block of it."""

    buckets: Array
    """(N,) int16: the bucket, or −1 for an image that cannot be read."""
    keys: Array
    """(N,) 16-byte strings: the key in that bucket's shards."""
    skipped: list[Skipped]
    """(name, reason) of the unreadable ones, in order."""


class LatentFolder:
    """What was encoded with the same weights and transform: shards per bucket, an index per source.

    Args:
        cache_dir: of all latent caches.
    Attributes:
        sizes: (height, width) in pixels per bucket; one where there are no buckets.
        shapes: (2C, h, w) of the moments per bucket.
        masked: whether rows have a mask as their last channel.
        stores: one per bucket.
    Raises: UserError: crop random, one bucket only, an unwritable folder.
    """

    def __init__(self, cache_dir: str | Path, encoder: Encoder) -> None:
        self.encoder, self.sizes, self.masked = encoder, encoder.sizes, encoder.masked
        config = encoder.config
        if config.crop == "random":
            raise UserError(
                "data.crop=random cannot be cached: latents are encoded once. Use center or pad, "
                "or latents.online=true, which encodes at every step."
            )
        if config.buckets and len(self.sizes) == 1:
            raise UserError(
                f"data.buckets=true gives one shape only, {self.sizes[0]}: lower data.bucket_step="
                f"{config.bucket_step} or raise data.bucket_max_ratio={config.bucket_max_ratio}."
            )
        self.path = Path(cache_dir) / f"latents-{encoder.key}"
        self.shapes = self._prepare(encoder)
        self.stores = [
            Shards(self.bucket_path(i), (c + self.masked, h, w))
            for i, (c, h, w) in enumerate(self.shapes)
        ]

    def _prepare(self, encoder: Encoder) -> list[Shape]:
        """Make the folders; find the moments' shapes (remembered in about.json)."""
        about = self.path / "about.json"
        try:
            for number in range(len(self.sizes)):
                self.bucket_path(number).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        try:
            encoder.shapes = encoder.shapes_like(read_json(about)["moments_shape"])
        except (UserError, KeyError, TypeError, ValueError, ZeroDivisionError):  # none, or damaged
            facts = {
                "moments_shape": encoder.shapes[0],
                "image_size": encoder.config.image_size,
                "crop": encoder.config.crop,
                "buckets": self.sizes,
            }
            _write(about, json.dumps(facts).encode())
        return encoder.shapes

    def bucket_path(self, number: int) -> Path:
        """Where one bucket's latents are."""
        height, width = self.sizes[number]
        return self.path / f"{height}x{width}" if len(self.sizes) > 1 else self.path

    def refresh(self) -> None:
        """Look for what other processes have written."""
        for store in self.stores:
            store.refresh()

    def bucket_of(self, key: str) -> int | None:
        """Which bucket holds an image, or None."""
        return next((i for i, store in enumerate(self.stores) if key in store), None)

    def read_index(self, name: str, count: int) -> LatentIndex | None:
        """Read an index of `count` images; None if it is missing or names a missing latent."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            tensors = load((self.path / f"{name}.safetensors").read_bytes())
            buckets, keys = tensors["buckets"], tensors["keys"].reshape(-1).view("S16")
            skipped = [(name, why) for name, why in json.loads(bytes(tensors["skipped"]))]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None
        if not len(buckets) == len(keys) == count or buckets.max(initial=-1) >= len(self.stores):
            return None
        stored = (store.has(keys[buckets == i]).all() for i, store in enumerate(self.stores))
        return LatentIndex(buckets, keys, skipped) if all(stored) else None

    def write_index(self, name: str, index: LatentIndex) -> None:
        """Commit an index. Raises: UserError: the folder cannot be written."""
        from safetensors.numpy import save

        text = json.dumps(index.skipped).encode()
        tensors: dict[str, Any] = {
            "buckets": index.buckets.astype(np.int16),
            "keys": _key_rows(index.keys),
            "skipped": np.frombuffer(text, np.uint8),
        }
        _write(self.path / f"{name}.safetensors", save(tensors))


class Shards:
    """All complete shards of one folder, read by key. Threads may share it.

    Attributes: shape: (2C, h, w) of every row.
    """

    def __init__(self, folder: Path, shape: Shape) -> None:
        self.folder, self.shape = folder, shape
        self._row_bytes = 2 * math.prod(shape)
        self._paths: list[Path] = []
        self._starts, self._offsets = [0], list[int]()  # first row of each shard, and one past all
        self._keys, self._rows = np.empty(0, "S16"), np.empty(0, np.int64)  # sorted by key
        self._open = lru_cache(OPEN_FILES)(lambda number: FileIO(str(self._paths[number])))
        self._lock = threading.Lock()
        self.refresh()

    def __len__(self) -> int:
        return self._starts[-1]

    def __contains__(self, key: str) -> bool:
        return bool(self.has(key_array([key]))[0])

    def refresh(self) -> None:
        """Look for shards that have appeared since the last time."""
        found, known = [self._keys], set(self._paths)
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            if path in known:
                continue
            try:
                keys, offset = _read_header(path, self.shape)
            except (OSError, ValueError, KeyError) as error:  # its rows are encoded again
                _log.warning("ignoring the unreadable latent shard %s (%s)", path, error)
                continue
            self._paths.append(path)
            self._offsets.append(offset)
            self._starts.append(self._starts[-1] + len(keys))
            found.append(keys)
        if len(found) > 1:
            keys = np.concatenate(found)
            rows = np.concatenate([self._rows, np.arange(len(self._rows), len(keys))])
            by_key = np.argsort(keys, kind="stable")
            self._keys, self._rows = keys[by_key], rows[by_key]

    def has(self, keys: Array) -> Array:
        """Say for each 16-byte key whether it is stored."""
        if not len(self._keys):
            return np.zeros(len(keys), bool)
        place = np.searchsorted(self._keys, keys, side="right") - 1
        return (place >= 0) & (self._keys[place] == keys)

    def rows(self, keys: Array) -> Array:
        """Look up row numbers. Raises: KeyError: a key is not stored."""
        if not bool(self.has(keys).all()):
            raise KeyError("a latent that the index names is not stored")
        return self._rows[np.searchsorted(self._keys, keys, side="right") - 1]

    def read(self, rows: Array) -> Tensor:
        """Read rows: float16 (B, 2C, h, w). Raises: UserError: the files have gone."""
        out = np.empty((len(rows), *self.shape), dtype=np.float16)
        view, size = out.reshape(-1).view(np.uint8).data, self._row_bytes
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        with self._lock:
            for i, (shard, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
                try:
                    file = self._open(shard)
                    file.seek(self._offsets[shard] + (row - self._starts[shard]) * size)
                    if file.readinto(view[i * size : (i + 1) * size]) != size:
                        raise OSError("it is shorter than it was")
                except OSError as error:
                    raise UserError(
                        f"the latent cache lost {self._paths[shard]} ({error}) while it was in "
                        "use. Start again: what is missing is encoded anew."
                    ) from error
        return torch.from_numpy(out)


def _read_header(path: Path, shape: Shape) -> tuple[Array, int]:
    """Keys of a shard and the offset of its first row.

    Raises: ValueError, KeyError, OSError: not a complete shard of rows of this shape.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length < 2**16:
            raise ValueError("not a shard")
        header, start = json.loads(file.read(length)), 8 + length
        rows, keys = header["moments"], header["keys"]
        if rows["dtype"] != "F16" or tuple(rows["shape"][1:]) != shape:
            raise ValueError("rows of another shape")
        if path.stat().st_size != start + max(rows["data_offsets"][1], keys["data_offsets"][1]):
            raise ValueError("incomplete")
        file.seek(start + keys["data_offsets"][0])
        found = np.frombuffer(file.read(16 * keys["shape"][0]), "S16")
        if len(found) != rows["shape"][0]:
            raise ValueError("keys and rows differ in number")
        return found, start + rows["data_offsets"][0]


def write_shard(folder: Path, keys: Sequence[str], moments: Tensor) -> None:
    """Write rows as one shard; moments: (N, 2C, h, w) float16.

    Raises: UserError: the folder cannot be written.
    """
    from safetensors.torch import save

    rows = torch.from_numpy(_key_rows(key_array(keys)))
    tensors = {"keys": rows, "moments": moments.contiguous()}
    _write(folder / f"shard-{uuid.uuid4().hex[:16]}.safetensors", save(tensors))


def key_array(keys: Iterable[str]) -> Array:
    """Keys (32 hexadecimal digits each) as an array of 16-byte strings."""
    return np.array([bytes.fromhex(key) for key in keys], dtype="S16")


def _key_rows(keys: Array) -> Array:
    """16-byte strings as rows of bytes, (N, 16) uint8."""
    return np.ascontiguousarray(keys).view(np.uint8).reshape(-1, 16)


def _write(file: Path, data: bytes) -> None:
    try:
        with atomic_file(file) as temporary, open(temporary, "wb") as target:
            target.write(data)
            target.flush()
            os.fsync(target.fileno())
    except OSError as error:
        raise _unwritable(file.parent, error) from error


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"the latent cache cannot be written to {folder} ({error}). Choose another folder "
        "(latents.cache_dir) or free the disk; what was encoded so far is kept."
    )
