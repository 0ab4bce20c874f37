"""Latents are encoded once and kept; captions are never part of what is kept.

The autoencoder is frozen while the U-Net trains, so its output for a picture is always the same
and is stored as the moments (mean and log-variance) of q(z|x). A row's key is the picture's
content; a folder per (autoencoder weights, transform) holds the rows:

    <cache_dir>/latents-<weights and transform>/part-*.arrow        see latent_store
    <cache_dir>/latents-<weights and transform>/index-<source>.json each picture's key, skipped ones

So a second run encodes nothing, one changed picture is one new row, and new captions cost nothing.
With several processes the main one builds while the others wait; then they call the same function,
which finds everything there.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentdiff.data.images import UnreadableImage
from latentdiff.data.latent_store import LatentStore, LatentWriter
from latentdiff.data.source import DataConfig, Skipped, Source, group_of, problems_of
from latentdiff.data.transforms import TRANSFORM_VERSION, to_tensor
from latentdiff.errors import UserError

Shape = tuple[int, int, int]


class LatentCache:
    """The usable pictures of a source as stored moments, with the captions the source has now.

    Attributes:
        skipped: (name, reason) of every picture left out.
        source_indices: which picture of the source each entry is.
        shape: (2C, h, w).
    """

    def __init__(
        self, source: Source, store: LatentStore, keys: list[str | None], skipped: list[Skipped]
    ) -> None:
        self.skipped, self.shape = skipped, store.shape
        self.source_indices = [i for i, key in enumerate(keys) if key is not None]
        usable = [key for key in keys if key is not None]
        self._source, self._store, self._rows = source, store, store.rows(usable)
        self._fingerprint = _digest("\n".join(usable), store.folder.name)

    def __len__(self) -> int:
        return len(self.source_indices)

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[str, ...], str]:
        """Return (moments float16 (2C, h, w), captions, name)."""
        return self.moments_of([index])[0], self.captions(index), self.name(index)

    def moments_of(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Read many at once: float16 (B, 2C, h, w), in the order asked for."""
        return self._store.read(self._rows[np.asarray(indices, dtype=np.int64)])

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of one picture."""
        return self._source.captions(self.source_indices[index])

    def name(self, index: int) -> str:
        """Return the name of one picture."""
        return self._source.name(self.source_indices[index])

    def group(self, index: int) -> str:
        """Return the key that `split` keeps together."""
        return group_of(self._source, self.source_indices[index])

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
        config: image_size, crop and background are used.
        threads: how many pictures are decoded at a time.
    Raises: UserError: crop "random", unwritable folder, moments that are not finite, no usable
        picture.
    """
    if config.crop == "random":
        raise UserError(
            "data.crop=random cannot be cached: latents are encoded once. Use center or pad."
        )
    if hasattr(autoencoder, "check_image_size"):
        autoencoder.check_image_size(config.image_size)
    autoencoder.to(device)
    folder = Path(cache_dir) / f"latents-{cache_key(autoencoder, config)}"
    shape = _prepare(folder, autoencoder, config, device)
    store = LatentStore(folder, shape)
    index_file = folder / f"index-{_digest(source.fingerprint())}.json"
    index = _read_index(index_file, len(source), store)
    if index is None:
        work = _Encoding(source, autoencoder, config, store, torch.device(device))
        index = work.run(batch_size, threads, progress)
        store.refresh()
        _write_json(index_file, index._asdict())
    skipped = [*problems_of(source), *((name, reason) for name, reason in index.skipped)]
    if not any(index.keys):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped[:5])
        raise UserError(f"0 usable images: none of {len(source)} could be read ({reasons}).")
    return LatentCache(source, store, index.keys, skipped)


def cache_key(autoencoder: Any, config: DataConfig) -> str:
    """Hash everything but the picture that decides the moments: weights and transform."""
    transform = (TRANSFORM_VERSION, config.image_size, config.crop, tuple(config.background))
    digest = hashlib.blake2b(repr(transform).encode(), digest_size=8)
    for name, tensor in sorted(autoencoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Index(NamedTuple):
    keys: list[str | None]
    skipped: list[Skipped]


class _Job(NamedTuple):
    number: int
    key: str | None
    image: Tensor | None
    problem: Skipped | None


class _Encoding:
    """One pass over a source: decode in threads, encode in batches what the store lacks."""

    def __init__(
        self,
        source: Source,
        autoencoder: Any,
        config: DataConfig,
        store: LatentStore,
        device: torch.device,
    ) -> None:
        self._source, self._autoencoder, self._config = source, autoencoder, config
        self._store, self._device, self._dtype = store, device, _dtype(autoencoder)
        self._content_key = getattr(source, "content_key", None)

    def run(self, batch_size: int, threads: int, progress: bool) -> _Index:
        from tqdm import tqdm

        keys: list[str | None] = [None] * len(self._source)
        skipped: list[Skipped] = []
        queue: dict[str, Tensor] = {}
        written: set[str] = set()
        with ThreadPoolExecutor(threads) as pool, _writer(self._store) as writer:
            jobs = _prefetch(pool, self._load, range(len(keys)), 2 * batch_size + threads)
            for job in tqdm(jobs, "encoding latents", len(keys), disable=not progress, unit="img"):
                if job.problem is not None:
                    skipped.append(job.problem)
                    continue
                keys[job.number] = job.key
                if job.key and job.image is not None and job.key not in written:
                    queue[job.key] = job.image
                if len(queue) == batch_size:
                    writer.append(list(queue), self._encode(queue))
                    written.update(queue)
                    queue = {}
            if queue:
                writer.append(list(queue), self._encode(queue))
        return _Index(keys, skipped)

    def _load(self, index: int) -> _Job:
        try:
            key = self._content_key(index) if self._content_key else None
            if key is not None and key in self._store:
                return _Job(index, key, None, None)
            image = self._source[index].image
        except UnreadableImage as error:
            return _Job(index, None, None, (error.name, error.reason))
        key = key or _digest(image.tobytes(), repr(image.size))
        if key in self._store:
            return _Job(index, key, None, None)
        c = self._config
        return _Job(
            index, key, to_tensor(image, c.image_size, c.crop, background=c.background), None
        )

    def _encode(self, queue: dict[str, Tensor]) -> Tensor:
        images = torch.stack(list(queue.values())).to(self._device, self._dtype)
        moments = _moments(self._autoencoder, images)
        stored = moments.to(torch.float16)
        if not bool(torch.isfinite(stored).all()):
            raise UserError(
                "the autoencoder gave moments that are not finite numbers in 16 bit "
                f"(it runs in {moments.dtype}). Load it in float32; if that is so, it is broken."
            )
        return stored.cpu()


def _moments(autoencoder: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        return autoencoder.encode_moments(images)


def _dtype(autoencoder: Any) -> torch.dtype:
    floats = (t.dtype for t in autoencoder.state_dict().values() if t.is_floating_point())
    return next(floats, torch.float32)


def _writer(store: LatentStore) -> LatentWriter:
    return LatentWriter(store.folder, store.shape)


def _prefetch(
    pool: ThreadPoolExecutor, call: Callable[[int], _Job], items: Iterable[int], ahead: int
) -> Iterator[_Job]:
    """Yield call(item) in order while the pool works on at most `ahead` items."""
    waiting: deque[Future[_Job]] = deque()
    for item in items:
        waiting.append(pool.submit(call, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _prepare(folder: Path, autoencoder: Any, config: DataConfig, device: Any) -> Shape:
    """Make the folder; find the moments' shape (remembered in about.json)."""
    about = folder / "about.json"
    if about.is_file():
        c, h, w = json.loads(about.read_text())["moments_shape"]
        return c, h, w
    try:
        folder.mkdir(parents=True, exist_ok=True)
        size = config.image_size
        blank = torch.zeros(1, 3, size, size, device=device, dtype=_dtype(autoencoder))
        _, c, h, w = _moments(autoencoder, blank).shape
        facts = {"moments_shape": [c, h, w], "image_size": config.image_size, "crop": config.crop}
        _write_json(about, facts)
    except OSError as error:
        raise UserError(
            f"the latent cache cannot be written to {folder} ({error}). "
            "Choose another folder or free the disk."
        ) from error
    return c, h, w


def _read_index(file: Path, count: int, store: LatentStore) -> _Index | None:
    """Read the keys of a known source; None when there is no index or a row is missing."""
    try:
        data = json.loads(file.read_text())
        index = _Index(data["keys"], [(name, reason) for name, reason in data["skipped"]])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    complete = all(key is None or key in store for key in index.keys)
    return index if complete and len(index.keys) == count else None


def _write_json(file: Path, data: Any) -> None:
    temporary = file.with_name(f".tmp-{uuid.uuid4().hex[:8]}-{file.name}")
    temporary.write_text(json.dumps(data))
    os.replace(temporary, file)


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode("utf-8", "backslashreplace"))
        digest.update(b"\x1f")
    return digest.hexdigest()
