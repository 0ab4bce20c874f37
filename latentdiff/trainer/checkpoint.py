"""Checkpoints that are either whole or not there, and the newest of them.

    <folder>/step-00000500/   unet, ema, optimizer .safetensors, then manifest.json

A checkpoint is written into a hidden folder beside its final place, the manifest (with the sizes of
all other files) last, and renamed when it is on disk. Tensors are only ever read as safetensors.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from latentdiff.errors import UserError

_MANIFEST = "manifest.json"


def write_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], facts: dict[str, Any]
) -> Path:
    """Write the state after `step` optimizer steps; nothing is left behind when it fails half-way.

    Args:
        folder: holds all checkpoints of the run.
        step: how many steps have been made.
        tensors: one named set of tensors per file.
        facts: JSON values to find again in the manifest.
    """
    from safetensors.torch import save_file

    final = folder / f"step-{step:08d}"
    partial = folder / f".partial-{final.name}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name, group in tensors.items():
            # Transposed and channels_last tensors must be laid out plainly in the file.
            plain = {key: value.detach().cpu().contiguous() for key, value in group.items()}
            save_file(plain, partial / f"{name}.safetensors")
        sizes = {path.name: _synced_size(path) for path in sorted(partial.iterdir())}
        manifest = {**facts, "step": step, "files": sizes}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        _synced_size(partial / _MANIFEST)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints, oldest first."""
    found = sorted(folder.glob("step-*")) if folder.is_dir() else []
    return [path for path in found if _is_complete(path)]


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, or None."""
    return next(reversed(checkpoints(folder)), None)


def delete_old(folder: Path, keep_last: int) -> None:
    """Keep the newest `keep_last` complete checkpoints, and nothing that is half-written."""
    for path in checkpoints(folder)[:-keep_last]:
        # The manifest goes first, so that a half-deleted folder is not taken for a checkpoint.
        (path / _MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".partial-*"):
        shutil.rmtree(path, ignore_errors=True)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return the facts that a checkpoint was written with, `step` among them."""
    return json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """Read one named set of tensors, on the CPU.

    Raises: UserError: the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = checkpoint / f"{name}.safetensors"
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file} cannot be read ({error}). Delete the folder {checkpoint.name} to go on from "
            "the checkpoint before it."
        ) from error


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
