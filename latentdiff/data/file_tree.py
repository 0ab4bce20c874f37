"""A folder or a .zip archive seen the same way: names with '/', bytes, and cheap change marks."""

from __future__ import annotations

import os
import stat
import zipfile
from pathlib import Path
from typing import Protocol

from latentdiff.errors import UserError


class FileTree(Protocol):
    """Files below one root."""

    root: str

    def names(self) -> list[str]:
        """List all files, sorted, hidden ones and archive litter left out."""
        ...

    def read(self, name: str) -> bytes:
        """Read one file. Raises: OSError, KeyError or zipfile.BadZipFile."""
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
        return ZipTree(str(place))
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

    def read(self, name: str) -> bytes:
        with open(os.path.join(self.root, name), "rb") as file:
            return file.read()

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

    def read(self, name: str) -> bytes:
        # A forked worker would share the file position with its parent: each process opens its own.
        archive = self._archive if self._pid == os.getpid() else self._open()
        return archive.read(name)

    def mark(self, name: str) -> str:
        info = self._archive.getinfo(name)
        return f"{info.file_size}-{info.CRC}"

    def __getstate__(self) -> dict[str, str]:
        return {"root": self.root}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.root = state["root"]
        self._open()


def _is_litter(part: str) -> bool:
    return part.startswith(".") or part == "__MACOSX"
