"""Files and folders written all at once (a reader, or a crash, sees the old or the new), and JSON.

JSON comes out of strangers' files too: an object, or one clear error.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latentdiff.errors import UserError

#: Only a folder with this file in it is taken for a model that may be replaced.
INDEX = "model_index.json"


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a path beside `target`, of the same ending; its file takes target's place when the
    block ends well.

    Raises:  OSError: what writing or replacing raises; target is as it was.
    """
    target = Path(os.path.realpath(target))  # what a link points to is replaced, not the link
    temporary = target.with_name(f".tmp-{uuid.uuid4().hex[:8]}-{target.name}")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def written_file(target: Path) -> Iterator[Path]:
    """`atomic_file` in a folder that is made for it. Raises: UserError: it cannot be written."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as new:
            yield new
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror or error}).") from error


def write_text(target: Path, text: str) -> None:
    """Write a text file in UTF-8, all at once. Raises: OSError."""
    with atomic_file(target) as new:
        new.write_text(text, encoding="utf-8")


def write_json(target: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object for people to read, all at once. Raises: OSError."""
    write_text(target, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def free_folder(wanted: Path) -> Path:
    """The folder itself, or the first of FOLDER-2, FOLDER-3 … that is not there yet."""
    folder, number = wanted, 2
    while folder.exists():
        folder = wanted.with_name(f"{wanted.name}-{number}")
        number += 1
    return folder


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`; it takes target's place when the block ends well."""
    temporary = target.with_name(f".{target.name}.writing-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        _replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_folder(target: Path, ours: Collection[str]) -> Iterator[Path]:
    """Write a model folder as `whole_folder` does, and keep what else is in it.

    Args:    target: may exist already; entries of it that are not in `ours` are carried over.
             ours: names that a folder of this kind consists of.
    Raises:  UserError: target is a file, holds something else, or cannot be written.
    """
    target = target.absolute()
    _check(target)
    try:
        with whole_folder(target) as new:
            yield new
            for entry in target.iterdir() if target.exists() else ():
                if entry.name not in ours:
                    _copy(entry, new / entry.name)
    except OSError as error:
        raise UserError(f"cannot write a model to {target}: {error.strerror or error}.") from error


def _check(target: Path) -> None:
    if target.is_file():
        raise UserError(f"cannot write a model folder to {target}: it is a file.")
    entries = sorted(p.name for p in target.iterdir()) if target.is_dir() else []
    if entries and INDEX not in entries:
        raise UserError(
            f"cannot write a model to {target}: it is not a model folder, but holds "
            f"{', '.join(entries[:5])}. Choose a new or empty folder."
        )


def _replace(temporary: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    shutil.rmtree(old, ignore_errors=True)
    try:
        if target.exists():
            target.rename(old)
        temporary.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy2(source, target, follow_symlinks=False)


#: Characters; the largest that models have, whole vocabularies with their merges, are under 10 MB.
LONGEST = 64 * 2**20


def read_json(file: Path) -> dict[str, Any]:
    """What a file holds. Raises: UserError: see `parse_json`; or it is missing or too large."""
    try:
        if (length := file.stat().st_size) > LONGEST:
            raise UserError(f"{file} is no configuration: it has {length:,} bytes.")
        return parse_json(file.read_text(encoding="utf-8"), file)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from error


def parse_json(text: str, where: object) -> dict[str, Any]:
    """What a text holds.

    Args:    where: what it was read from, for the message.
    Raises:  UserError: not JSON, nested too deeply, a number of thousands of digits, or no object.
    """
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise UserError(f"{where} is not valid JSON: it is nested too deeply.") from error
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{where} must hold a JSON object; it holds a {type(found).__name__}.")
    return found


def default_cache() -> Path:
    """~/.cache/latentdiff, or what XDG_CACHE_HOME says."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "latentdiff"
