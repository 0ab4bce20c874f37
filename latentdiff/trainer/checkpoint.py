"""Checkpoints that are either whole or not there, and the newest of them.

    <folder>/step-00000500/   unet, ema, optimizer .safetensors, then manifest.json

A checkpoint is written into a hidden folder beside its final place: every process writes what it
has, then the first one the manifest (with the sizes of all other files), and renames the folder
when all is on disk. Tensors are only ever read as safetensors.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.trainer.ranks import process_rank, share
from latentdiff.trainer.tensor_files import write_tensors

T = TypeVar("T")
_MANIFEST = "manifest.json"


class CheckpointError(UserError):
    """Writing failed (the disk is full, say); what was there before is untouched."""


def write_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], facts: dict[str, Any]
) -> Path:
    """Write the state after `step` optimizer steps; nothing is left behind when it fails half-way.

    All processes must call this, and all see the same outcome.

    Args:
        folder: holds all checkpoints of the run; the same one for all processes.
        step: how many steps have been made.
        tensors: one named set of tensors per file, each process with its own rows of them.
        facts: JSON values to find again in the manifest.
    Raises: CheckpointError: on every process, when one of them could not write.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".partial-{final.name}"
    first = process_rank() == 0

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def write() -> dict[str, int]:
        written = [write_tensors(partial, name, group) for name, group in tensors.items()]
        return {path.name: _synced_size(path) for path in written if path is not None}

    def finish(sizes: dict[str, int]) -> None:
        _check_all_there(partial, sizes)
        manifest = {**facts, "step": step, "files": sizes}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        _synced_size(partial / _MANIFEST)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        _sync_folder(folder)

    try:
        _together(begin if first else _nothing, step)
        sizes = {k: v for found in _together(write, step) for k, v in found.items()}
        _together((lambda: finish(sizes)) if first else _nothing, step)
    finally:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints, oldest first."""
    found = sorted(folder.glob("step-*")) if folder.is_dir() else []
    return [path for path in found if _is_complete(path)]


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, or None."""
    return next(reversed(checkpoints(folder)), None)


def delete_old(folder: Path, keep_last: int, keep_every: int | None = None) -> None:
    """Keep the newest `keep_last` complete checkpoints, and nothing that is half-written.

    Args:    keep_every: those after a multiple of so many steps stay for good.
    """
    for path in checkpoints(folder)[:-keep_last]:
        if keep_every is not None and int(path.name.removeprefix("step-")) % keep_every == 0:
            continue
        # The manifest goes first, so that a half-deleted folder is not taken for a checkpoint.
        (path / _MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    half_deleted = [p for p in folder.glob("step-*") if not (p / _MANIFEST).exists()]
    for path in [*folder.glob(".partial-*"), *half_deleted]:
        shutil.rmtree(path, ignore_errors=True)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return the facts that a checkpoint was written with, `step` among them."""
    return json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))


def _together(action: Callable[[], T], step: int) -> list[T]:
    """Run an action on every process; when it fails on one, it fails on all."""
    from safetensors import SafetensorError

    result, problem = None, None
    try:
        result = action()
    except (OSError, SafetensorError) as error:
        problem = str(error)
    told = share((result, problem))
    if found := next((text for _, text in told if text is not None), None):
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written: {found}. Earlier checkpoints "
            "are as they were. Make room on the disk (or lower loop.keep_last)."
        )
    return [value for value, _ in told]  # type: ignore[misc]


def _nothing() -> None:
    """What the other processes do meanwhile."""


def _check_all_there(folder: Path, sizes: Mapping[str, int]) -> None:
    missing = [name for name in sizes if not (folder / name).is_file()]
    if missing:
        raise OSError(
            f"{', '.join(missing[:3])} of another process is not in {folder}: all machines must "
            "share the output folder"
        )


def _is_complete(path: Path) -> bool:
    try:
        files = read_manifest(path)["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _synced_size(path: Path) -> int:
    """Force a file to the disk and return its size."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_size


def _sync_folder(folder: Path) -> None:
    """Force a rename to the disk, where folders can be opened (not on Windows)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
