"""Latents on disk: Arrow files of (key, moments) rows that only ever grow by whole files.

    <folder>/part-<id>.arrow     columns key: string, moments: fixed-size list of float16

A part is written under another name and renamed when it is complete, so a killed run leaves whole
parts and nothing that could be taken for one. Rows are read through memory maps.
"""

from __future__ import annotations

import logging
import math
import os
import time
import uuid
from collections.abc import Iterable, Sequence
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


class LatentStore:
    """All complete parts of one folder, read by key.

    Attributes: shape: (2C, h, w) of every row.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int]) -> None:
        self.folder, self.shape = folder, shape
        self._chunks: list[np.ndarray[Any, Any]] = []
        self._starts: list[int] = []
        self._row_of: dict[str, int] = {}
        self._count = 0
        self._opened: set[Path] = set()
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._row_of

    def refresh(self) -> None:
        """Open the parts that have appeared since the last time."""
        from datasets import Dataset

        for path in sorted(self.folder.glob("part-*.arrow")):
            if path in self._opened:
                continue
            self._opened.add(path)
            try:
                table = Dataset.from_file(str(path)).data
            except Exception as error:  # e.g. a disk that was full: these rows are encoded again
                _log.warning("ignoring the unreadable latent file %s (%s)", path, error)
                continue
            for chunk in table.column("moments").chunks:
                values = chunk.flatten().to_numpy(zero_copy_only=True)
                self._chunks.append(values.reshape(-1, *self.shape))
                self._starts.append(self._count)
                self._count += len(self._chunks[-1])
            first = self._count - table.num_rows
            keys = table.column("key").to_pylist()
            self._row_of.update((key, first + n) for n, key in enumerate(keys))

    def rows(self, keys: Iterable[str]) -> np.ndarray[Any, Any]:
        """Look up row numbers. Raises: KeyError: a key is not stored."""
        return np.fromiter((self._row_of[key] for key in keys), dtype=np.int64)

    def read(self, rows: np.ndarray[Any, Any]) -> Tensor:
        """Copy rows out of the memory map: float16 (B, 2C, h, w)."""
        out = np.empty((len(rows), *self.shape), dtype=np.float16)
        chunk_of = np.searchsorted(self._starts, rows, side="right") - 1
        for chunk in np.unique(chunk_of):
            here = np.nonzero(chunk_of == chunk)[0]
            out[here] = self._chunks[chunk][rows[here] - self._starts[chunk]]
        return torch.from_numpy(out)


class LatentWriter:
    """Appends rows to a folder as parts; use it in a `with` block.

    What was appended before an exception or an interrupt is kept: rows stand on their own.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int]) -> None:
        self._folder, self._values = folder, math.prod(shape)
        self._rows_per_part = max(1, PART_BYTES // (2 * self._values))
        self._writer: Any = None
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
        self._close()

    def append(self, keys: Sequence[str], moments: Tensor) -> None:
        """Write rows; moments: (B, 2C, h, w), stored as float16.

        Raises: UserError: the folder cannot be written.
        """
        values = moments.to("cpu", torch.float16).reshape(len(keys), self._values).numpy()
        try:
            if self._writer is None:
                self._open()
            self._writer.write_batch({"key": list(keys), "moments": values})
        except OSError as error:
            raise self._unwritable(error) from error
        self._rows += len(keys)
        if self._rows >= self._rows_per_part:
            self._close()

    def _open(self) -> None:
        from datasets import Features, List, Value
        from datasets.arrow_writer import ArrowWriter

        name = f"{uuid.uuid4().hex[:16]}.arrow"
        self._temporary, self._final = self._folder / f".tmp-{name}", self._folder / f"part-{name}"
        features = Features(
            {"key": Value("string"), "moments": List(Value("float16"), length=self._values)}
        )
        self._writer = ArrowWriter(path=str(self._temporary), features=features)
        self._rows = 0

    def _close(self) -> None:
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        try:
            writer.finalize()
            os.replace(self._temporary, self._final)
        except OSError as error:
            raise self._unwritable(error) from error

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
