"""A folder or a .zip archive seen the same way: names with '/', bytes, and cheap change marks."""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from pathlib import Path
from typing import Protocol

from latentdiff.errors import UserError

#: No picture that can be decoded needs more; a sparse file or a zip bomb claims more than fits.
MAX_PICTURE_BYTES = 512 * 2**20
#: What reading one file of a tree raises when the file is broken, locked or gone.
READ_ERRORS = (OSError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


class FileTree(Protocol):
    """Files below one root."""

    root: str

    def names(self) -> list[str]:
        """List all files, sorted, hidden ones and archive litter left out."""
        ...

    def read(self, name: str, limit: int | None = MAX_PICTURE_BYTES) -> bytes:
        """Read one file. Raises: one of READ_ERRORS; OSError for more than `limit` bytes."""
        ...

    def mark(self, name: str) -> str:
        """Return something that changes whenever the file does, without reading it."""
        ...


def open_tree(path: str) -> FileTree:
    """Open a folder or a .zip file. Raises: UserError: when there is neither."""
    place = Path(path).expanduser()
    if place.is_dir():
        return FolderTree(str(place))
    if zipfile.is_zipfile(place):
        try:
            return ZipTree(str(place))
        except READ_ERRORS as error:
            raise UserError(f"data.path: the archive {path} is damaged ({error}).") from error
    if place.exists():
        raise UserError(f"data.path must be a folder or a .zip file; {path} is neither.")
    parent = place.absolute()
    while not parent.exists():
        parent = parent.parent
    raise UserError(
        f"data.path: the folder {path} does not exist (looked in {os.getcwd()}; "
        f"{parent} is there). Check the spelling or give an absolute path."
    )


class FolderTree:
    """A folder and its sub-folders."""

    def __init__(self, root: str) -> None:
        self.root = root

    def names(self) -> list[str]:
        found = []
        for folder, folders, files in os.walk(self.root):
            folders[:] = [f for f in folders if not _is_litter(f)]
            relative = os.path.relpath(folder, self.root).replace(os.sep, "/")
            prefix = "" if relative == "." else relative + "/"
            found += [prefix + file for file in files if not _is_litter(file)]
        return sorted(found)

    def read(self, name: str, limit: int | None = MAX_PICTURE_BYTES) -> bytes:
        return read_file(os.path.join(self.root, name), limit)

    def mark(self, name: str) -> str:
        status = os.stat(os.path.join(self.root, name))
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        return f"{status.st_size}-{status.st_mtime_ns}"


class ZipTree:
    """The members of a .zip archive, read in place."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._open()

    def _open(self) -> zipfile.ZipFile:
        self._archive, self._pid = zipfile.ZipFile(self.root), os.getpid()
        return self._archive

    def names(self) -> list[str]:
        members = [m.filename for m in self._archive.infolist() if not m.is_dir()]
        return sorted(m for m in members if not any(_is_litter(part) for part in m.split("/")))

    def read(self, name: str, limit: int | None = MAX_PICTURE_BYTES) -> bytes:
        # A forked worker would share the file position with its parent: each process opens its own.
        archive = self._archive if self._pid == os.getpid() else self._open()
        # zipfile never unpacks more than the size that the archive states.
        _check_size(archive.getinfo(name).file_size, limit)
        try:
            return archive.read(name)
        except EOFError as error:
            raise OSError("the archive ends within it") from error

    def mark(self, name: str) -> str:
        info = self._archive.getinfo(name)
        return f"{info.file_size}-{info.CRC}"

    def __getstate__(self) -> dict[str, str]:
        return {"root": self.root}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.root = state["root"]
        self._open()


def read_file(path: str | os.PathLike[str], limit: int | None = MAX_PICTURE_BYTES) -> bytes:
    """Read a regular file. Raises: OSError: a pipe or device, or more than `limit` bytes."""
    # Asked before opening: opening a pipe that nobody writes to would wait for ever.
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")
    _check_size(status.st_size, limit)
    with open(path, "rb") as file:
        return file.read()


def _check_size(size: int, limit: int | None) -> None:
    if limit is not None and size > limit:
        raise OSError(f"{size / 2**20:.0f} MB, more than the {limit / 2**20:.0f} MB allowed")


def _is_litter(part: str) -> bool:
    return part.startswith(".") or part == "__MACOSX"
