"""Files and folders replaced in one step: a reader, or a crash, sees the old or the new one."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from latentdiff.errors import UserError

#: Only a folder with this file in it is taken for a model that may be replaced.
INDEX = "model_index.json"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` that takes its place, flushed to the disk, if the block succeeds.

    Raises: OSError: it cannot be written.
    """
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path, ours: Collection[str]) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its place when the block ends well.

    Args:    target: may exist already; entries of it that are not in `ours` are carried over.
             ours: names that a folder of this kind consists of.
    Raises:  UserError: target is a file, holds something else, or cannot be written.
    """
    target = target.absolute()
    _check(target)
    temporary = target.with_name(f".{target.name}.writing-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        yield temporary
        _replace(temporary, target, ours)
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check(target: Path) -> None:
    if target.is_file():
        raise UserError(f"cannot write a model folder to {target}: it is a file.")
    entries = sorted(p.name for p in target.iterdir()) if target.is_dir() else []
    if entries and INDEX not in entries:
        raise UserError(
            f"cannot write a model to {target}: it is not a model folder, but holds "
            f"{', '.join(entries[:5])}. Choose a new or empty folder."
        )


def _replace(temporary: Path, target: Path, ours: Collection[str]) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    for entry in target.iterdir():
        if entry.name not in ours:
            _copy(entry, temporary / entry.name)
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy2(source, target, follow_symlinks=False)


def _unwritable(target: Path, error: OSError) -> UserError:
    return UserError(f"cannot write a model to {target}: {error.strerror or error}.")
