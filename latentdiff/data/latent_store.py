"""Latents on disk: Arrow files of (key, moments) rows that only ever grow by whole files.

    <folder>/part-<id>.arrow     columns key: string, moments: fixed-size list of float16

A part is written under another name and renamed when it is complete, so a killed run leaves whole
parts and nothing that could be taken for one. In memory are 24 bytes per row (its key and place);
the rows themselves are read where they lie in the files. No memory map stays open: the pages that
it touches count as the process's own, so a long run would seem to eat as much memory as the set.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentdiff.errors import UserError

_log = logging.getLogger(__name__)
#: A part is closed at this size; what a killed run loses is at most this much work.
PART_BYTES = 64 * 2**20
#: How many parts may be open at a time; systems allow 1024 files and often fewer.
OPEN_FILES = 128
Array = np.ndarray[Any, Any]


def key_bytes(key: str) -> bytes:
    """A key as 16 bytes: what 32 hexadecimal digits stand for, a hash of anything else."""
    if len(key) == 32:
        try:
            return bytes.fromhex(key)
        except ValueError:
            pass
    return hashlib.blake2b(key.encode("utf-8", "backslashreplace"), digest_size=16).digest()


def key_array(keys: Iterable[str]) -> Array:
    """Keys as an array of 16-byte strings."""
    return np.array([key_bytes(key) for key in keys], dtype="S16")


class LatentStore:
    """All complete parts of one folder, read by key. Threads may share it.

    Attributes: shape: (2C, h, w) of every row.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int]) -> None:
        self.folder, self.shape = folder, shape
        self._row_bytes = 2 * math.prod(shape)
        self._paths: list[Path] = []
        # One entry per record batch: its first row, where its values begin, and in which file.
        self._starts = self._offsets = self._files = np.empty(0, np.int64)
        self._count = 0
        self._keys, self._rows = np.empty(0, "S16"), np.empty(0, np.int64)  # sorted by key
        self._open: OrderedDict[int, FileIO] = OrderedDict()
        self._lock = threading.Lock()
        self.refresh()

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: str) -> bool:
        return bool(self.has(key_array([key]))[0])

    def refresh(self) -> None:
        """Look for parts that have appeared since the last time."""
        keys, known = [self._keys], set(self._paths)
        rows = [self._rows]
        for path in sorted(self.folder.glob("part-*.arrow")):
            if path in known:
                continue
            found = _read_part(path, self._row_bytes)
            if found is None:
                continue
            part_keys, offsets, counts = found
            starts = self._count + np.cumsum(counts) - counts
            self._starts = np.append(self._starts, starts)
            self._offsets = np.append(self._offsets, offsets)
            self._files = np.append(self._files, np.full(len(counts), len(self._paths)))
            self._paths.append(path)
            keys.append(part_keys)
            rows.append(np.arange(self._count, self._count + len(part_keys)))
            self._count += len(part_keys)
        if len(keys) > 1:
            joined = np.concatenate(keys)
            by_key = np.argsort(joined, kind="stable")
            self._keys, self._rows = joined[by_key], np.concatenate(rows)[by_key]

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
        batch = np.searchsorted(self._starts, rows, side="right") - 1
        offsets = self._offsets[batch] + (rows - self._starts[batch]) * self._row_bytes
        view, size = out.reshape(-1).view(np.uint8), self._row_bytes
        with self._lock:
            places = zip(self._files[batch].tolist(), offsets.tolist(), strict=True)
            for number, (file, offset) in enumerate(places):
                source = self._file(file)
                source.seek(offset)
                if source.readinto(view[number * size : (number + 1) * size].data) != size:
                    raise _gone(self._paths[file], "it is shorter than it was")
        return torch.from_numpy(out)

    def _file(self, number: int) -> FileIO:
        source = self._open.get(number)
        if source is None:
            if len(self._open) >= OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            try:
                source = self._open[number] = FileIO(str(self._paths[number]))
            except OSError as error:
                raise _gone(self._paths[number], str(error)) from error
        return source


def _read_part(path: Path, row_bytes: int) -> tuple[Array, Array, Array] | None:
    """Keys of all rows; offset in the file and number of rows of each record batch."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as file:
            whole = file.read_buffer()
            table = pyarrow.ipc.open_stream(whole).read_all()  # views into the buffer
            keys = key_array(table.column("key").to_pylist())
            offsets, counts = [], []
            for chunk in table.column("moments").chunks:
                values = chunk.flatten()
                start = values.buffers()[1].address + 2 * values.offset
                if 2 * len(values) != row_bytes * len(chunk):
                    raise ValueError("rows of another shape")
                offsets.append(start - whole.address)
                counts.append(len(chunk))
    except Exception as error:  # e.g. a disk that was full: these rows are encoded again
        _log.warning("ignoring the unreadable latent file %s (%s)", path, error)
        return None
    return keys, np.array(offsets, np.int64), np.array(counts, np.int64)


def _gone(path: Path, reason: str) -> UserError:
    return UserError(
        f"the latent cache lost {path} ({reason}) while it was in use. Start again: what is "
        "missing is encoded anew."
    )


class LatentWriter:
    """Appends rows to a folder as parts; use it in a `with` block.

    What was appended before an exception or an interrupt is kept: rows stand on their own.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int]) -> None:
        self._folder, self._values = folder, math.prod(shape)
        self._rows_per_part = max(1, PART_BYTES // (2 * self._values))
        self._writer: Any = None
        self._file: Any = None
        self._temporary = self._final = folder
        self._rows = 0

    def __enter__(self) -> LatentWriter:
        _remove_stale(self._folder)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def append(self, keys: Sequence[str], moments: Tensor) -> None:
        """Write rows; moments: (B, 2C, h, w), stored as float16.

        Raises: UserError: the folder cannot be written.
        """
        import pyarrow as pa

        values = moments.to("cpu", torch.float16).contiguous().reshape(-1).numpy()
        lists = pa.FixedSizeListArray.from_arrays(pa.array(values, pa.float16()), self._values)
        batch = pa.record_batch([pa.array(list(keys), pa.string()), lists], ["key", "moments"])
        try:
            if self._writer is None:
                self._start(batch.schema)
            self._writer.write_batch(batch)
        except OSError as error:
            raise self._unwritable(error) from error
        self._rows += len(keys)
        if self._rows >= self._rows_per_part:
            self.close()

    def close(self) -> None:
        """End the part that is being written, so that others see it."""
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        try:
            writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self._final)
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            self._temporary.unlink(missing_ok=True)

    def _start(self, schema: Any) -> None:
        import pyarrow

        name = f"{uuid.uuid4().hex[:16]}.arrow"
        self._temporary, self._final = self._folder / f".tmp-{name}", self._folder / f"part-{name}"
        self._file = open(self._temporary, "wb")  # noqa: SIM115  (closed with the part)
        self._writer = pyarrow.ipc.new_stream(self._file, schema)
        self._rows = 0

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"the latent cache cannot be written to {self._folder} ({error}). "
            "Choose another folder or free the disk; what was encoded so far is kept."
        )


def _remove_stale(folder: Path) -> None:
    """Delete what killed runs left; younger files may belong to a run that is still going."""
    for path in folder.glob(".tmp-*"):
        try:
            if time.time() - path.stat().st_mtime > 24 * 3600:
                path.unlink()
        except OSError:
            continue
