"""Files below one root, in a folder or a .zip, read with bounds and without leaving it by links.

A folder and an archive are seen the same way: names with '/', bytes, and cheap change stamps.
"""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from collections import deque
from fnmatch import fnmatchcase
from pathlib import Path

from latentdiff.data.images import display_name
from latentdiff.data.source import Skipped
from latentdiff.errors import UserError

#: No image that can be decoded needs more; a sparse file or a zip bomb claims more than fits.
MAX_IMAGE_BYTES = 512 * 2**20
#: Captions of a whole set are held in memory, at several times this size.
MAX_TABLE_BYTES = 2**30
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
_LEAVES = "a link that leaves the data folder (it leads to {}); data.follow_links=true follows it"
#: What reading one file of a tree raises when the file is broken, locked or gone.
READ_ERRORS = (OSError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


def open_tree(path: str, follow_links: bool = False) -> FolderTree | ZipTree:
    """Open a folder or a .zip file.

    A folder that holds nothing but one archive and its metadata file stands for the archive.

    Args:   follow_links: also follow links that leave the folder.
    Raises: UserError: when there is neither.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        others = [f for f in place.iterdir() if f.name not in METADATA_NAMES and f.name[0] != "."]
        if len(others) == 1 and others[0].suffix.lower() == ".zip":
            place = others[0]
    if place.is_dir():
        return FolderTree(str(place), follow_links)
    if place.is_file() and zipfile.is_zipfile(place):  # opening a pipe would wait for ever
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
    """A folder and its sub-folders, linked ones too.

    Links are followed where they stay inside the folder, and where they leave it if
    `follow_links`. No link is followed twice or back to a folder that it lies in.

    Attributes:
        problems: (name, reason) of folders that `names` did not enter.
        outside: files that are links to elsewhere, which are not read → where they lead.
    """

    def __init__(self, root: str, follow_links: bool = False) -> None:
        self.root, self._follow_links = root, follow_links
        self.problems: list[Skipped] = []
        self.outside: dict[str, str] = {}

    def names(self) -> list[str]:
        """List all files, sorted, hidden ones and archive litter left out."""
        found: list[str] = []
        self.problems, self.outside = [], {}
        root, links = os.path.realpath(self.root), set[str]()
        # A folder: its prefix, where it really is, and where the links on the way to it are. Linked
        # folders wait behind all others.
        waiting = deque([("", root, tuple[str, ...]())])
        while waiting:
            prefix, real, way = waiting.popleft()
            for entry in self._entries(prefix):
                name, place = prefix + entry.name, os.path.join(real, entry.name)
                if not entry.is_symlink():
                    if entry.is_dir():
                        waiting.appendleft((name + "/", place, way))
                    else:
                        found.append(name)
                    continue
                target = os.path.realpath(place)
                leaves = not (self._follow_links or Path(target).is_relative_to(root))
                if not os.path.isdir(place):
                    found.append(name)
                    self.outside |= {name: target} if leaves else {}
                elif problem := self._why_not(place, target, (*way, real), links, leaves):
                    self.problems.append((display_name(name), problem))
                else:
                    links.add(place)
                    waiting.append((name + "/", target, (*way, real)))
        return sorted(found)

    def _entries(self, prefix: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(os.path.join(self.root, prefix)) as entries:
                return [entry for entry in entries if not _is_litter(entry.name)]
        except OSError as error:
            reason = f"a folder that cannot be read ({error.strerror})"
            self.problems.append((display_name(prefix or self.root), reason))
            return []

    def _why_not(
        self, place: str, target: str, way: tuple[str, ...], links: set[str], leaves: bool
    ) -> str:
        """Why a linked folder is not entered; "" where it is."""
        if leaves:
            return _LEAVES.format(target)
        if any(Path(step).is_relative_to(target) for step in way):
            return "a link back to a folder that it lies in, which is not followed"
        return "a link that is followed under another name" * (place in links)

    def read(self, name: str, limit: int = MAX_IMAGE_BYTES) -> bytes:
        """Read one file. Raises: OSError, also for more than `limit` bytes."""
        return read_file(self._path(name), limit)

    def stamp(self, name: str) -> str:
        """Return what changes whenever the file does, without reading it. Raises: OSError."""
        status = os.stat(self._path(name))
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        return f"{status.st_size}-{status.st_mtime_ns}"

    def _path(self, name: str) -> str:
        if name in self.outside:
            raise OSError(_LEAVES.format(self.outside[name]))
        return os.path.join(self.root, name)


class ZipTree:
    """The members of a .zip archive, read in place; methods as of `FolderTree`.

    Where it has no metadata file at its root, one that lies beside it counts as a member.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.problems: list[Skipped] = []
        members = self._open().namelist()
        self._beside = {n: Path(root).with_name(n) for n in METADATA_NAMES if n not in members}

    def _open(self) -> zipfile.ZipFile:
        self._archive, self._pid = zipfile.ZipFile(self.root), os.getpid()
        return self._archive

    def __getstate__(self) -> dict[str, str]:
        return {"root": self.root}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__init__(state["root"])  # type: ignore[misc]

    def names(self) -> list[str]:
        """List the members."""
        members = [m.filename for m in self._archive.infolist() if not m.is_dir()]
        members += [name for name, path in self._beside.items() if path.is_file()]
        return sorted(m for m in members if not any(_is_litter(part) for part in m.split("/")))

    def read(self, name: str, limit: int = MAX_IMAGE_BYTES) -> bytes:
        """Unpack one member. Raises: one of READ_ERRORS."""
        if name in self._beside:
            return read_file(self._beside[name], limit)
        # A forked worker would share the file position with its parent: each process opens its own.
        archive = self._archive if self._pid == os.getpid() else self._open()
        info = archive.getinfo(name)
        check_size(info.file_size, limit)
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # zipfile unpacks a piece of bzip2 or LZMA whole, whatever size the archive states.
            raise OSError("packed by another method than store and deflate; pack it again")
        try:
            with archive.open(info) as member:
                return member.read(info.file_size)
        except EOFError as error:
            raise OSError("the archive ends within it") from error

    def stamp(self, name: str) -> str:
        """Return what changes whenever the member does."""
        info = self._archive.getinfo(name)
        return f"{info.file_size}-{info.CRC}"


def find_files(
    folder: Path, patterns: tuple[str, ...], follow_links: bool
) -> tuple[list[Path], list[Skipped]]:
    """Find files below a folder by patterns of their names, as `FolderTree` finds them.

    Returns: paths, sorted; and (name, reason) of the links that are not followed.
    """
    tree = FolderTree(str(folder), follow_links)
    names = [
        name
        for name in tree.names()
        if any(fnmatchcase(name.rpartition("/")[2], pattern) for pattern in patterns)
    ]
    linked = [(name, _LEAVES.format(tree.outside[name])) for name in names if name in tree.outside]
    return [folder / name for name in names if name not in tree.outside], [*tree.problems, *linked]


def is_inside(path: str | os.PathLike[str], *folders: str | os.PathLike[str]) -> bool:
    """Whether a path, after all links on it, lies in one of some folders."""
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(os.path.realpath(folder)) for folder in folders)


def read_file(path: str | os.PathLike[str], limit: int = MAX_IMAGE_BYTES) -> bytes:
    """Read a regular file. Raises: OSError: a pipe or device, or more than `limit` bytes."""
    # Asked before opening: opening a pipe that nobody writes to would wait for ever.
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")
    check_size(status.st_size, limit)
    with open(path, "rb") as file:
        return file.read()


def check_size(size: int, limit: int) -> None:
    """Refuse to read what is too large. Raises: OSError: more than `limit` bytes."""
    if size > limit:
        raise OSError(f"{size / 2**20:.0f} MB, more than the {limit / 2**20:.0f} MB allowed")


def _is_litter(part: str) -> bool:
    return part.startswith(".") or part == "__MACOSX"
