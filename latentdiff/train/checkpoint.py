"""Checkpoints that are either whole or not there, with all that an exact resume needs.

    <folder>/step-00000500/   unet, ema, optimizer .safetensors, say, then manifest.json

A checkpoint is written into a hidden folder beside its final place: every process writes what it
has, then the first one the manifest (with the sizes of all other files), and renames the folder
when all is on disk. Tensors are only ever read as safetensors. A named set of them is one file, or
one per process that has rows of it:

    unet.safetensors                      whole tensors
    unet-00001-of-00002.safetensors       rows; where they begin stands in the file's metadata

The pieces are laid out as torch.distributed.checkpoint's safetensors format has them, and its
HuggingFaceStorageReader reads them. Whatever number of processes wrote, any number can read: each
takes the rows that it wants, and only those are read from the disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from latentdiff.errors import UserError
from latentdiff.files import parse_json, read_json
from latentdiff.train.distributed import (
    is_first_copy,
    is_sharded,
    local,
    process_count,
    process_rank,
    release,
    rows,
    share,
)
from latentdiff.train.divergence import check_weights
from latentdiff.train.optimizer import load_named_state, named_state

if TYPE_CHECKING:
    from accelerate import Accelerator


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
    except (OSError, ValueError, SafetensorError) as error:
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
            offsets = parse_json((file.metadata() or {}).get(_OFFSETS, "{}"), path.name)
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
    unfinished = folder / f".partial-{final.name}"
    first = process_rank() == 0

    def begin() -> None:
        if first:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)

    def write() -> dict[str, int]:
        written = [write_tensors(unfinished, name, group) for name, group in tensors.items()]
        return {path.name: _synced_size(path) for path in written if path is not None}

    def finish(sizes: dict[str, int]) -> None:
        if not first:
            return
        _check_all_there(unfinished, sizes)
        manifest = {**facts, "step": step, "files": sizes}
        (unfinished / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        _synced_size(unfinished / _MANIFEST)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(unfinished, final)
        _sync_folder(folder)

    try:
        _together(begin, step)
        sizes = {k: v for found in _together(write, step) for k, v in found.items()}
        _together(lambda: finish(sizes), step)
    finally:
        if first:
            shutil.rmtree(unfinished, ignore_errors=True)
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
    manifest = read_json(checkpoint / _MANIFEST)
    # Earlier versions counted pictures.
    facts = manifest.get("facts", {}).items()
    return {**manifest, "facts": {key.replace("picture", "image"): fact for key, fact in facts}}


def _together(action: Callable[[], T], step: int) -> list[T]:
    """Run an action on every process; when it fails on one, it fails on all."""
    from safetensors import SafetensorError

    result, problem = None, None
    try:
        result = action()
    except (OSError, SafetensorError) as error:
        problem = str(error)
    answers = share((result, problem))
    if found := next((text for _, text in answers if text is not None), None):
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written: {found}. Earlier checkpoints "
            "are as they were. Make room on the disk (or lower loop.keep_last)."
        )
    return [value for value, _ in answers]  # type: ignore[misc]


def _check_all_there(folder: Path, sizes: Mapping[str, int]) -> None:
    missing = [name for name in sizes if not (folder / name).is_file()]
    if missing:
        raise OSError(
            f"{', '.join(missing[:3])} of another process is not in {folder}: all machines must "
            "share the output folder"
        )


def _is_complete(path: Path) -> bool:
    try:
        manifest = read_manifest(path)
        int(manifest["step"]), float(manifest.get("seconds", 0))
        files = manifest["files"].items()
        return all((path / name).stat().st_size == size for name, size in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
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


@dataclass
class TrainingState:
    """Weights, averages and optimizers, with the facts a resumed run must agree on.

    A checkpoint has a file for each model, under its name, and for its optimizer: `optimizer` of a
    single model, else `<name>_optimizer`. Order, noise and learning rate are functions of the step,
    so they need no state.
    """

    models: Mapping[str, nn.Module]
    """By name; the modules themselves, not their wrappers. Their weights may be sharded."""
    optimizers: Mapping[str, torch.optim.Optimizer]
    """The optimizers themselves, not their wrappers; the same names."""
    accelerator: Accelerator
    """The processes of the run."""
    folder: Path
    """Where the checkpoints are."""
    keep_last: int
    """How many of them are kept."""
    keep_every: int | None
    """Checkpoints after a multiple of so many steps are never deleted."""
    facts: dict[str, Any]
    """Dotted configuration keys and data fingerprints that decide the numbers."""
    averages: Mapping[str, Tensor] = field(default_factory=dict)
    """The moving averages of the weights, if there are any; see `ema.averages`."""
    whole: bool = True
    """Whether frozen weights are stored too; not where a pretrained model has them."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What runs had that were started before there was an option."""

    def save(self, step: int, seconds: float) -> None:
        """Write a checkpoint after `step` steps; every process writes its own rows.

        Raises: CheckpointError: on all processes; the earlier checkpoints are kept.
                UserError: likewise, when the run has diverged.
        """
        tensors, checked = dict[str, dict[str, Tensor]](), dict[str, dict[str, Tensor]]()
        for name, model in self.models.items():
            release(model)
            tensors[name] = self._weights(model)
            tensors[self._optimizer_file(name)] = named_state(self.optimizers[name], model)
            checked["weight" if len(self.models) == 1 else f"{name} weight"] = tensors[name]
        if self.averages:
            tensors["ema"] = checked["average"] = dict(self.averages)
        check_weights(checked, step)
        scaler = self.accelerator.scaler
        facts = {
            "seconds": seconds,
            "facts": self.facts,
            "processes": self.accelerator.num_processes,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "torch": torch.__version__,
        }
        write_checkpoint(self.folder, step, tensors, facts)
        if self.accelerator.is_main_process:
            delete_old(self.folder, self.keep_last, self.keep_every)

    def resume(self) -> tuple[int, float]:
        """Load the newest complete checkpoint; return (steps made, seconds spent).

        A run that was killed before its first checkpoint begins again: the same steps follow.
        Raises: UserError: the checkpoint belongs to a run that cannot be continued exactly.
        """
        # The first process decides: a folder on the network may look older to another one.
        checkpoint = share(latest(self.folder))[0]
        if checkpoint is None:
            return 0, 0.0
        manifest = read_manifest(checkpoint)
        _compare(manifest["facts"], self.facts, self.defaults, checkpoint)
        self._load(checkpoint)
        if self.accelerator.is_main_process:  # a kill may have come before the old ones were gone
            delete_old(self.folder, self.keep_last, self.keep_every)
        if self.accelerator.scaler is not None and manifest["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(manifest["scaler"])
        return int(manifest["step"]), float(manifest["seconds"])

    def _optimizer_file(self, name: str) -> str:
        return "optimizer" if len(self.models) == 1 else f"{name}_optimizer"

    def _weights(self, model: nn.Module) -> dict[str, Tensor]:
        state = model.state_dict()
        if self.whole:
            return state
        return {n: state[n] for n, p in model.named_parameters() if p.requires_grad}

    def _load(self, checkpoint: Path) -> None:
        for name, model in self.models.items():
            read_into(checkpoint, name, self._weights(model))
            release(model)
            wanted = partial(_rows_of_moment, dict(model.named_parameters()))
            moments = read_tensors(checkpoint, self._optimizer_file(name), wanted)
            load_named_state(self.optimizers[name], model, moments)
        read_into(checkpoint, "ema", self.averages)


def _rows_of_moment(parameters: Mapping[str, Tensor], key: str) -> slice | None:
    """Which rows this process has of `<moment>/<parameter>`."""
    return rows(parameters[key.partition("/")[2]])


def read_into(checkpoint: Path, name: str, targets: Mapping[str, Tensor]) -> None:
    """Fill tensors with what is stored of the rows that this process has.

    Raises: UserError: one is not stored; the run began without power-function averages, say.
    """
    if not targets:
        return
    nothing = slice(0, 0)
    stored = read_tensors(
        checkpoint, name, lambda key: rows(targets[key]) if key in targets else nothing
    )
    if missing := [key for key in targets if key not in stored]:
        advice = (
            "Averages cannot be started half-way: go on with the power_ema.every and "
            "power_ema.sigma_rel that the run began with, or with power_ema.every=0."
            if name == "ema"
            else "It is of another model: start in another output folder."
        )
        raise UserError(f"the checkpoint's {name} lacks {missing[0]}. {advice}")
    for key, target in targets.items():
        local(target).copy_(stored[key])


def stored_facts(folder: Path) -> dict[str, Any] | None:
    """The manifest of the checkpoint that a run would go on from, if there is one."""
    checkpoint = share(latest(folder))[0]
    return read_manifest(checkpoint) if checkpoint is not None else None


def _compare(
    stored: dict[str, Any], now: dict[str, Any], defaults: Mapping[str, Any], checkpoint: Path
) -> None:
    """Refuse other settings. An option that one side does not know had its default there."""
    then, now = ({**defaults, **facts} for facts in (stored, now))
    missing = object()
    lines = [
        f"  {key}: {then.get(key, '(not there)')!r} then, {now.get(key, '(not there)')!r} now"
        for key in {**then, **now}
        if then.get(key, missing) != now.get(key, missing)
    ]
    if then.get("images") != now.get("images"):
        lines.append(
            "  (images is a hash of the images, how they are read and the autoencoder; embedded "
            "colour profiles are converted to sRGB now, which earlier versions did not do)"
        )
    if lines:
        raise UserError(
            f"--resume: {checkpoint} was written with other settings, so the run would not go on "
            "exactly as it began:\n" + "\n".join(lines) + "\nSet them back, or start a run of its "
            "own in another output folder."
        )
