"""The pass over a source that fills a latent cache: decode in threads, encode in batches, commit.

Work is cut into blocks of pictures (latent_index). Process r of R takes the unfinished blocks
r, r + R, r + 2R, … and talks to no other process, so none waits and none can hang on a dead one.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentdiff.data.buckets import nearest
from latentdiff.data.images import UnreadableImage
from latentdiff.data.latent_folder import LatentFolder, encode_moments, float_type
from latentdiff.data.latent_index import IndexFiles, LatentIndex
from latentdiff.data.latent_store import LatentWriter, key_bytes
from latentdiff.data.masks import latent_mask, stack_masks
from latentdiff.data.source import DataConfig, Skipped, Source
from latentdiff.data.transforms import to_tensor
from latentdiff.errors import UserError


class Done(NamedTuple):
    """What one process did."""

    blocks: int
    """Blocks that it committed."""
    encoded: int
    """Pictures that it encoded (equal and already stored ones are not)."""


class _Job(NamedTuple):
    number: int
    key: str = ""
    bucket: int = -1
    image: Tensor | None = None
    mask: Tensor | None = None
    problem: Skipped | None = None


def index_files(source: Source, folder: LatentFolder) -> IndexFiles:
    """Where the index of a source lies in a cache folder."""
    return IndexFiles(folder.path, digest(source.fingerprint()), len(source))


def digest(*parts: str | bytes) -> str:
    """32 hexadecimal digits that differ when any part does."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part if isinstance(part, bytes) else part.encode("utf-8", "backslashreplace"))
        found.update(b"\x1f")
    return found.hexdigest()


class Encoding:
    """Fills a folder with the latents of a source.

    Args:
        batch_size: pictures encoded at a time.
        threads: pictures decoded at a time.
    """

    def __init__(
        self,
        source: Source,
        autoencoder: Any,
        config: DataConfig,
        folder: LatentFolder,
        device: torch.device,
        batch_size: int = 32,
        threads: int = 4,
    ) -> None:
        self._source, self._autoencoder, self._config = source, autoencoder, config
        self._folder, self._device, self._dtype = folder, device, float_type(autoencoder)
        self._batch_size, self._threads = batch_size, threads
        self.files = index_files(source, folder)
        self._content_key = getattr(source, "content_key", None)
        self._encoded = 0

    def run(self, rank: int = 0, ranks: int = 1, progress: bool = True) -> Done:
        """Make this process's unfinished blocks. Raises: UserError: nothing can be written."""
        from tqdm import tqdm

        files = self.files
        if files.read(self._folder.stores) is not None:
            return Done(0, 0)
        mine = range(rank, len(files.blocks), ranks)
        todo = [n for n in mine if files.read_block(n, self._folder.stores) is None]
        total, self._encoded = sum(len(files.blocks[n]) for n in todo), 0
        bar = tqdm(total=total, desc="encoding latents", disable=not progress, unit="img")
        with bar, ThreadPoolExecutor(self._threads) as pool:
            for number in todo:
                block = self._block(files.blocks[number], pool, bar.update)
                self._folder.refresh()  # what this block stored is not encoded again in the next
                files.write_block(number, block)
        return Done(len(todo), self._encoded)

    def _block(
        self, pictures: range, pool: ThreadPoolExecutor, tick: Callable[[int], Any]
    ) -> LatentIndex:
        places, keys = np.full(len(pictures), -1, np.int16), np.zeros(len(pictures), "S16")
        skipped: list[Skipped] = []
        queues: dict[int, dict[str, _Job]] = {}
        written: set[str] = set()
        with ExitStack() as stack:
            writers: dict[int, LatentWriter] = {}
            ahead = 2 * self._batch_size + self._threads
            for job in _prefetch(pool, self._load, pictures, ahead):
                tick(1)
                if job.problem is not None:
                    skipped.append(job.problem)
                    continue
                at = job.number - pictures.start
                places[at], keys[at] = job.bucket, key_bytes(job.key)
                if job.image is None or job.key in written:
                    continue
                if job.bucket not in writers:
                    writers[job.bucket] = stack.enter_context(self._writer(job.bucket))
                queue = queues.setdefault(job.bucket, {})
                queue[job.key] = job
                if len(queue) == self._batch_size:
                    self._flush(writers[job.bucket], queue, written)
            for bucket, queue in queues.items():
                if queue:
                    self._flush(writers[bucket], queue, written)
        return LatentIndex(places, keys, skipped)

    def _writer(self, bucket: int) -> LatentWriter:
        return LatentWriter(self._folder.bucket_path(bucket), self._folder.stores[bucket].shape)

    def _load(self, index: int) -> _Job:
        try:
            key = self._content_key(index) if self._content_key else None
            bucket = self._folder.bucket_of(key) if key is not None else None
            if key is not None and bucket is not None:
                return _Job(index, key, bucket)
            example = self._source[index]
        except UnreadableImage as error:
            return _Job(index, problem=(error.name, error.reason))
        image, mask, config = example.image, example.mask, self._config
        if key is None:
            marks = [mask.tobytes()] if mask is not None else []
            key = digest(image.tobytes(), repr(image.size), *marks)
            bucket = self._folder.bucket_of(key)
            if bucket is not None:
                return _Job(index, key, bucket)
        bucket = nearest(self._folder.sizes, *image.size)
        size = self._folder.sizes[bucket]
        pixels = to_tensor(image, size, config.crop, background=config.background)
        if not self._folder.masked:
            return _Job(index, key, bucket, pixels)
        latent = self._folder.shapes[bucket][1:]
        small = latent_mask(mask, image.size, size, config.crop, latent)
        return _Job(index, key, bucket, pixels, small)

    def _flush(self, writer: LatentWriter, queue: dict[str, _Job], written: set[str]) -> None:
        images = torch.stack([job.image for job in queue.values() if job.image is not None])
        moments = encode_moments(self._autoencoder, images.to(self._device, self._dtype))
        stored = moments.to(torch.float16).cpu()
        if not bool(torch.isfinite(stored).all()):
            raise UserError(
                "the autoencoder gave moments that are not finite numbers in 16 bit "
                f"(it runs in {moments.dtype}). Load it in float32; if that is so, it is broken."
            )
        masks = [job.mask for job in queue.values() if job.mask is not None]
        writer.append(list(queue), stack_masks(stored, torch.stack(masks)) if masks else stored)
        self._encoded += len(queue)
        written.update(queue)
        queue.clear()


def _prefetch(
    pool: ThreadPoolExecutor, call: Callable[[int], _Job], items: Iterable[int], ahead: int
) -> Iterator[_Job]:
    """Yield call(item) in order while the pool works on at most `ahead` items."""
    waiting: deque[Future[_Job]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(call, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:  # after Ctrl-C what is still in the queue is not waited for
            future.cancel()
