"""A named set of tensors in safetensors files: one file, or one per process that has rows of it.

    unet.safetensors                      whole tensors
    unet-00001-of-00002.safetensors       rows; where they begin stands in the file's metadata

The pieces are laid out as torch.distributed.checkpoint's safetensors format has them, and its
HuggingFaceStorageReader reads them. Whatever number of processes wrote, any number can read: each
takes the rows that it wants, and only those are read from the disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.trainer.ranks import process_count, process_rank
from latentdiff.trainer.sharding import is_first_copy, is_sharded, local, rows

#: Where torch.distributed.checkpoint keeps the offsets of the pieces.
_OFFSETS, _SAVED = "DCP_SHARDING_INFO", "saved_offsets"


def write_tensors(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> Path | None:
    """Write what this process has of the tensors, unless an earlier one has the same.

    Returns: the file; None when there is nothing to write.
    """
    mine = {key: value for key, value in tensors.items() if is_first_copy(value)}
    # Transposed and channels_last tensors must be laid out plainly in the file.
    plain = {key: local(value).cpu().contiguous() for key, value in mine.items()}
    if not any(is_sharded(value) for value in tensors.values()):
        return _saved(plain, folder / f"{name}.safetensors") if process_rank() == 0 else None
    plain = {key: value for key, value in plain.items() if value.numel() or value.ndim == 0}
    if not plain:
        return None
    offsets = {key: {_SAVED: _offset(mine[key])} for key in plain}
    number = f"{process_rank() + 1:05d}-of-{process_count():05d}"
    metadata = {"format": "pt", _OFFSETS: json.dumps(offsets)}
    return _saved(plain, folder / f"{name}-{number}.safetensors", metadata)


def read_tensors(
    folder: Path, name: str, wanted: Callable[[str], slice | None] = lambda key: None
) -> dict[str, Tensor]:
    """Read a set of tensors, on the CPU.

    Args:    wanted: name of a tensor → which of its rows; None for all (numbers are always whole).
    Raises:  UserError: a file is missing or damaged.
    """
    from safetensors import SafetensorError

    try:
        with _opened(folder, name) as pieces:
            return {key: _rows_of(found, wanted(key)) for key, found in pieces.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder / name}*.safetensors cannot be read ({error}). Delete the folder "
            f"{folder.name} to go on from the checkpoint before it."
        ) from error


def _saved(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> Path:
    from safetensors.torch import save_file

    save_file(tensors, file, metadata)
    return file


def _offset(tensor: Tensor) -> list[int]:
    part = rows(tensor)
    return [part.start if part is not None and axis == 0 else 0 for axis in range(tensor.ndim)]


@contextmanager
def _opened(folder: Path, name: str) -> Iterator[dict[str, list[tuple[int, Any]]]]:
    """Yield for each tensor its pieces as (first row, slice of an open file), in order."""
    from safetensors import safe_open

    files = sorted(folder.glob(f"{name}-*-of-*.safetensors")) or [folder / f"{name}.safetensors"]
    pieces: dict[str, list[tuple[int, Any]]] = {}
    with ExitStack() as stack:
        for path in files:
            file = stack.enter_context(safe_open(path, "pt"))
            offsets = json.loads((file.metadata() or {}).get(_OFFSETS, "{}"))
            for key in file.keys():  # noqa: SIM118  (not a mapping)
                start = (offsets.get(key, {}).get(_SAVED) or [0])[0]
                pieces.setdefault(key, []).append((start, file.get_slice(key)))
        yield {key: sorted(found, key=lambda piece: piece[0]) for key, found in pieces.items()}


def _rows_of(pieces: list[tuple[int, Any]], wanted: slice | None) -> Tensor:
    first = pieces[0][1]
    if not first.get_shape():
        return first[...]
    found = []
    for start, piece in pieces:
        stop = start + piece.get_shape()[0]
        a, b = (start, stop) if wanted is None else (wanted.start, wanted.stop)
        if max(a, start) < min(b, stop):
            found.append(piece[max(a, start) - start : min(b, stop) - start])
    return torch.cat(found) if found else first[0:0]
