"""A person's own pictures: a folder (or .zip) with metadata.jsonl/.csv, or a .txt beside each.

A folder and an archive are seen the same way: names with '/', bytes, and cheap change marks.
"""

from __future__ import annotations

import hashlib
import os
import stat
import unicodedata
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from posixpath import dirname, splitext
from typing import Any, NamedTuple, Protocol

from latentdiff.data.captions import (
    MAX_CAPTION_BYTES,
    choose_caption_column,
    clean_captions,
    decode_text,
    read_table,
)
from latentdiff.data.images import (
    IMAGE_ENDINGS,
    UnreadableImage,
    display_name,
    open_grey,
    open_image,
    open_with_alpha,
)
from latentdiff.data.source import EXAMPLE, DataConfig, Example, Skipped, few
from latentdiff.errors import UserError, did_you_mean

#: No picture that can be decoded needs more; a sparse file or a zip bomb claims more than fits.
MAX_PICTURE_BYTES = 512 * 2**20
#: Captions of a whole set are held in memory, at several times this size.
MAX_TABLE_BYTES = 2**30
_LEAVES = "a link that leaves the data folder (it leads to {}); data.follow_links=true follows it"
#: What reading one file of a tree raises when the file is broken, locked or gone.
READ_ERRORS = (OSError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


class FileTree(Protocol):
    """Files below one root.

    Attributes: problems: (name, reason) of folders that `names` did not enter.
    """

    root: str
    problems: list[Skipped]

    def names(self) -> list[str]:
        """List all files, sorted, hidden ones and archive litter left out."""
        ...

    def read(self, name: str, limit: int = MAX_PICTURE_BYTES) -> bytes:
        """Read one file. Raises: one of READ_ERRORS; OSError for more than `limit` bytes."""
        ...

    def mark(self, name: str) -> str:
        """Return something that changes whenever the file does, without reading it."""
        ...


def open_tree(path: str, follow_links: bool = False) -> FileTree:
    """Open a folder or a .zip file.

    Args:   follow_links: also follow links that leave the folder.
    Raises: UserError: when there is neither.
    """
    place = Path(path).expanduser()
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

    Attributes: outside: files that are links to elsewhere, which are not read → where they lead.
    """

    def __init__(self, root: str, follow_links: bool = False) -> None:
        self.root, self._follow_links = root, follow_links
        self.problems: list[Skipped] = []
        self.outside: dict[str, str] = {}

    def names(self) -> list[str]:
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

    def read(self, name: str, limit: int = MAX_PICTURE_BYTES) -> bytes:
        return read_file(self._path(name), limit)

    def mark(self, name: str) -> str:
        status = os.stat(self._path(name))
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        return f"{status.st_size}-{status.st_mtime_ns}"

    def _path(self, name: str) -> str:
        if name in self.outside:
            raise OSError(_LEAVES.format(self.outside[name]))
        return os.path.join(self.root, name)


class ZipTree:
    """The members of a .zip archive, read in place."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.problems: list[Skipped] = []
        self._open()

    def _open(self) -> zipfile.ZipFile:
        self._archive, self._pid = zipfile.ZipFile(self.root), os.getpid()
        return self._archive

    def names(self) -> list[str]:
        members = [m.filename for m in self._archive.infolist() if not m.is_dir()]
        return sorted(m for m in members if not any(_is_litter(part) for part in m.split("/")))

    def read(self, name: str, limit: int = MAX_PICTURE_BYTES) -> bytes:
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

    def mark(self, name: str) -> str:
        info = self._archive.getinfo(name)
        return f"{info.file_size}-{info.CRC}"

    def __getstate__(self) -> dict[str, str]:
        return {"root": self.root}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.root, self.problems = state["root"], []
        self._open()


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


def read_file(path: str | os.PathLike[str], limit: int = MAX_PICTURE_BYTES) -> bytes:
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


#: Ends the name of a mask file: cat.mask.png for cat.jpg.
MASK_ENDING = ".mask.png"
_LONELY_MASK = "a mask without its picture: none beside it has its name"
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
_FORMATS = (
    "Captions are looked for in (1) metadata.jsonl, lines like "
    '{"file_name": "cat.png", "text": "a cat"}; (2) metadata.csv with the columns file_name and '
    "text; (3) a text file beside each image: cat.txt for cat.png."
)


class _Entry(NamedTuple):
    file: str
    captions: tuple[str, ...]
    mark: str
    mask: str | None = None


class FolderSource:
    """Captioned images below a folder.

    Attributes: problems: (name, reason) of images without a caption and of captions without an
        image; they are left out.
    Raises: UserError: no folder, no images, no captions, unknown caption column, nothing usable.
    """

    def __init__(self, config: DataConfig) -> None:
        self._tree = open_tree(str(config.path or EXAMPLE), config.follow_links)
        self._background, self._loss_mask = config.background, config.loss_mask
        names = self._tree.names()
        self.problems: list[Skipped] = list(self._tree.problems)
        images = [n for n in names if n.lower().endswith(IMAGE_ENDINGS)]
        masks: dict[str, str] = {}
        if config.loss_mask == "file":
            masks = {_normal(_mask_stem(n)): n for n in images if _mask_stem(n)}
            images = [n for n in images if not _mask_stem(n)]
        if not images:
            raise UserError(_no_images(self._tree.root, names, self.problems))
        tables = [n for n in names if n.rsplit("/", 1)[-1].lower() in METADATA_NAMES]
        self._unread: dict[str, str] = {}
        if tables:
            captions = self._from_tables(tables, images, names, config.caption_column)
        else:
            captions = self._from_side_cars(_Names(names), images)
        self._entries = list(self._usable(images, captions, masks))
        if not self._entries:
            raise UserError(self._nothing_usable(len(images), bool(tables)))
        if config.loss_mask == "file":
            self._check_masks(masks, images)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Example:
        name, data = self.name(index), self.read(index)
        captions, mask = self.captions(index), self._entries[index].mask
        if self._loss_mask == "alpha":
            image, alpha = open_with_alpha(data, name, self._background)
            return Example(image, captions, name, alpha)
        image = open_image(data, name, self._background)
        grey = open_grey(self._bytes(mask), display_name(mask)) if mask is not None else None
        return Example(image, captions, name, grey)

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of one image."""
        return self._entries[index].captions

    def name(self, index: int) -> str:
        """Return the image's path below the folder."""
        return display_name(self._entries[index].file)

    def content_key(self, index: int) -> str:
        """Hash the file's bytes and the background. Raises: UnreadableImage."""
        digest = hashlib.blake2b(self.read(index), digest_size=16)
        digest.update(bytes(self._background))
        mask = self._entries[index].mask
        if mask is not None:
            digest.update(self._bytes(mask))
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """Hash names, sizes and modification times of the images; reads none of them."""
        digest = hashlib.blake2b(bytes(self._background), digest_size=16)
        for entry in self._entries:
            digest.update(f"{display_name(entry.file)}\x1f{entry.mark}\x1e".encode())
        return digest.hexdigest()

    def read(self, index: int) -> bytes:
        """Return the bytes of one image's file. Raises: UnreadableImage."""
        return self._bytes(self._entries[index].file)

    def _bytes(self, file: str) -> bytes:
        try:
            return self._tree.read(file)
        except READ_ERRORS as error:
            raise UnreadableImage(display_name(file), f"cannot be read ({error})") from error

    def _usable(
        self, images: list[str], captions: dict[str, tuple[str, ...]], masks: dict[str, str]
    ) -> Iterable[_Entry]:
        for file in images:
            if not captions.get(file):
                self.problems.append((display_name(file), self._unread.get(file, "no caption")))
                continue
            try:
                mask = masks.get(_normal(splitext(file)[0]))
                marks = [self._tree.mark(name) for name in (file, mask) if name is not None]
                yield _Entry(file, captions[file], "+".join(marks), mask)
            except OSError as error:
                self.problems.append((display_name(file), f"cannot be read ({error})"))

    def _check_masks(self, masks: dict[str, str], images: list[str]) -> None:
        """List masks without a picture. Raises: UserError: no picture has a mask."""
        stems = {_normal(splitext(image)[0]) for image in images}
        lonely = [(display_name(masks[s]), _LONELY_MASK) for s in sorted(masks.keys() - stems)]
        self.problems += lonely
        if not any(entry.mask for entry in self._entries):
            found = few(lonely) or "there are none"
            raise UserError(
                f"data.loss_mask=file: none of the {len(self._entries)} pictures with captions in "
                f"{display_name(self._tree.root)} has a mask ({found}). A mask stands beside its "
                "picture: cat.mask.png for cat.jpg."
            )

    def _from_tables(
        self, tables: list[str], images: list[str], names: list[str], column: str | None
    ) -> dict[str, tuple[str, ...]]:
        by_name, known = _Names(images), _Names(names)
        captions: dict[str, tuple[str, ...]] = {}
        for table in tables:
            rows = read_table(self._read_table(table), display_name(table), column)
            if not rows:
                continue
            columns = list(dict.fromkeys(key for row in rows for key in row))
            if "file_name" not in columns:
                raise UserError(
                    f"{display_name(table)} has no column file_name; it has {', '.join(columns)}."
                    f"{did_you_mean('file_name', columns)} {_FORMATS}"
                )
            chosen = choose_caption_column(columns, column, display_name(table))
            for number, row in enumerate(rows, start=1):
                self._add_row(
                    row, chosen, f"{table} entry {number}", dirname(table), by_name, known, captions
                )
        return captions

    def _add_row(
        self,
        row: dict[str, Any],
        column: str,
        where: str,
        folder: str,
        by_name: _Names,
        known: _Names,
        captions: dict[str, tuple[str, ...]],
    ) -> None:
        given = str(row.get("file_name") or "").strip()
        path = f"{folder}/{given}" if folder else given
        image = by_name.find(path)
        if image is None:
            reason = self._why_no_image(path, given, known)
            self.problems.append((display_name(given or where), f"{reason} (named by {where})"))
        else:
            # Several lines for one image are several captions of it.
            texts = (*captions.get(image, ()), *clean_captions(row.get(column)))
            captions[image] = tuple(dict.fromkeys(texts))

    def _why_no_image(self, path: str, given: str, known: _Names) -> str:
        if not given:
            return "no file_name"
        if known.find(path) is None:
            return "not in the folder"
        if self._loss_mask == "file" and _mask_stem(given):
            return "the mask of another picture, as its name says"
        ending = splitext(given)[1] or "nothing"
        return (
            f"not taken for a picture, as its name ends in {ending} and not in one of "
            f"{', '.join(IMAGE_ENDINGS)}"
        )

    def _from_side_cars(self, names: _Names, images: list[str]) -> dict[str, tuple[str, ...]]:
        captions = {}
        beside = {image: (splitext(image)[0] + ".txt", image + ".txt") for image in images}
        own = {
            image: next(filter(None, map(names.exactly, two)), None)
            for image, two in beside.items()
        }
        taken = set(own.values())
        for image, two in beside.items():
            others = (file for file in map(names.find, two) if file and file not in taken)
            file = own[image] or next(others, None)
            if file is None:
                continue
            try:
                text = decode_text(self._tree.read(file, MAX_CAPTION_BYTES))
                captions[image] = clean_captions(text.splitlines())
            except (*READ_ERRORS, ValueError) as error:
                self._unread[image] = f"its caption {display_name(file)} cannot be read ({error})"
        return captions

    def _read_table(self, table: str) -> bytes:
        try:
            return self._tree.read(table, MAX_TABLE_BYTES)
        except READ_ERRORS as error:
            raise UserError(f"{display_name(table)} cannot be read ({error}).") from error

    def _nothing_usable(self, count: int, has_table: bool) -> str:
        root = display_name(self._tree.root)
        if not has_table and all(reason == "no caption" for _, reason in self.problems):
            return f"{root} has {count} images but no captions. {_FORMATS}"
        return f"{root}: 0 usable images of {count} ({few(self.problems)}). {_FORMATS}"


class _Names:
    """Files, found by what people call them, who are used to Windows and macOS."""

    def __init__(self, files: Iterable[str]) -> None:
        self._exact = {_normal(file): file for file in files}
        self._alike: dict[str, list[str]] = {}
        for file in self._exact.values():
            self._alike.setdefault(alike(file), []).append(file)

    def exactly(self, name: str) -> str | None:
        """The file of that name, or None."""
        return self._exact.get(_normal(name))

    def find(self, name: str) -> str | None:
        """The same, or the only file whose name differs in upper and lower case."""
        found = self._alike.get(alike(name), ())
        return self.exactly(name) or (found[0] if len(found) == 1 else None)


def alike(name: str) -> str:
    """The same for names that people take for one: whatever their upper and lower case."""
    return _normal(name).casefold()


def _mask_stem(name: str) -> str:
    """The name, without ending, of the picture that a mask file belongs to; "" for others."""
    return name[: -len(MASK_ENDING)] if name.lower().endswith(MASK_ENDING) else ""


def _normal(path: str) -> str:
    """Make names comparable: macOS stores é as two characters, Windows writes a\\b for a/b."""
    return unicodedata.normalize("NFC", path.replace("\\", "/")).removeprefix("./")


def _no_images(root: str, names: list[str], problems: list[Skipped]) -> str:
    endings = Counter(splitext(name)[1].lower() or "(no ending)" for name in names)
    found = ", ".join(f"{n} × {ending}" for ending, n in endings.most_common(5)) or "nothing"
    return (
        f"no images in {display_name(root)} or below it (found: {found}). Looked for files ending "
        f"in {', '.join(IMAGE_ENDINGS)}; convert others, such as .heic, first."
        + f" Left out: {few(problems)}."
        * bool(problems)
    )
