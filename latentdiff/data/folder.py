"""A user's own images: a folder (or .zip) with metadata.jsonl/.csv, or a text beside each."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from posixpath import basename, dirname, join, splitext
from typing import NamedTuple

from latentdiff.data.captions import (
    MAX_CAPTION_BYTES,
    choose_caption_column,
    clean_captions,
    decode_text,
    read_table,
)
from latentdiff.data.file_tree import MAX_TABLE_BYTES, METADATA_NAMES, READ_ERRORS, open_tree
from latentdiff.data.images import IMAGE_ENDINGS, UnreadableImage, display_name
from latentdiff.data.source import EXAMPLE, DataConfig, FileSource, Skipped, few, left_out
from latentdiff.errors import UserError, did_you_mean

#: Ends the name of a mask file: cat.mask.png for cat.jpg.
MASK_ENDING = ".mask.png"
_LONELY_MASK = "a mask without its image: none beside it has its name"
_UNUSED_MASK = "a mask, which data.loss_mask=file or data.inpaint_mask=true uses"
_FORMATS = (
    "Captions are looked for in (1) metadata.jsonl, lines like "
    '{"file_name": "cat.png", "text": "a cat"}; (2) metadata.csv with the columns file_name and '
    "text; (3) a text file beside each image: cat.txt or cat.caption for cat.png. Or take the file "
    "names: data.caption_from=filename."
)
#: Of the text files beside images.
_TEXT_ENDINGS = (".txt", ".caption")
_REPEATS = re.compile(r"(?:.*/)?([0-9]{1,4})_([^/]*)/[^/]*", re.DOTALL)
Captions = dict[str, tuple[str, ...]]


class _Entry(NamedTuple):
    file: str
    captions: tuple[str, ...]
    stamp: str
    mask: str | None


class FolderSource(FileSource):
    """Captioned images below a folder.

    Raises: UserError: no folder, no images, no captions, unknown caption column, nothing usable.
    """

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        self._tree = open_tree(str(config.path or EXAMPLE), config.follow_links)
        names = self._tree.names()
        self.problems += self._tree.problems
        images = [n for n in names if n.lower().endswith(IMAGE_ENDINGS)]
        masks: dict[str, str] = {}
        if config.mask_files:
            masks = {_normal(_mask_stem(n)): n for n in images if _mask_stem(n)}
            images = [n for n in images if not _mask_stem(n)]
        if not images:
            raise UserError(_no_images(self._tree.root, names, self.problems))
        tables = [n for n in names if basename(n).lower() in METADATA_NAMES]
        self._why_none: dict[str, str] = {}
        if config.caption_from == "filename":
            captions = {image: clean_captions(_words(image)) for image in images}
        elif tables:
            captions = self._captions_of_tables(tables, images, names)
        else:
            captions = self._captions_beside(images, names)
        if config.repeat_folders:
            for image in images:
                captions[image] = captions.get(image) or clean_captions(repeats(image)[1])
        self._entries = list(self._usable(images, captions, masks))
        if not self._entries:
            raise UserError(self._nothing_usable(len(images), bool(tables)))
        if config.mask_files:
            self._check_masks(masks, images)

    def __len__(self) -> int:
        return len(self._entries)

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of one image."""
        return self._entries[index].captions

    def name(self, index: int) -> str:
        """Return the image's path below the folder."""
        return display_name(self._entries[index].file)

    def fingerprint(self) -> str:
        """Hash names, sizes and modification times of the images; reads none of them."""
        digest = hashlib.blake2b(bytes(self.config.background), digest_size=16)
        for entry in self._entries:
            digest.update(f"{display_name(entry.file)}\x1f{entry.stamp}\x1e".encode())
        return digest.hexdigest()

    def read(self, index: int) -> bytes:
        """Return the bytes of one image's file. Raises: UnreadableImage."""
        return self._bytes(index, self._entries[index].file)

    def read_mask(self, index: int) -> bytes | None:
        """Return those of the mask beside it. Raises: UnreadableImage."""
        mask = self._entries[index].mask
        return None if mask is None else self._bytes(index, mask, f"its mask {display_name(mask)} ")

    def _bytes(self, index: int, file: str, what: str = "") -> bytes:
        try:
            return self._tree.read(file)
        except READ_ERRORS as error:
            raise UnreadableImage(self.name(index), f"{what}cannot be read ({error})") from error

    def _usable(
        self, images: list[str], captions: Captions, masks: dict[str, str]
    ) -> Iterator[_Entry]:
        for file in images:
            if not captions.get(file):
                reason = _UNUSED_MASK if _mask_stem(file) else "no caption"
                self._skip(file, self._why_none.get(file, reason))
                continue
            mask = masks.get(_normal(splitext(file)[0]))
            try:
                stamps = [self._tree.stamp(name) for name in (file, mask) if name is not None]
                yield _Entry(file, captions[file], "+".join(stamps), mask)
            except OSError as error:
                self._skip(file, f"cannot be read ({error})")

    def _skip(self, file: str, reason: str) -> None:
        self.problems.append((display_name(file), reason))

    def _check_masks(self, masks: dict[str, str], images: list[str]) -> None:
        """List masks without an image. Raises: UserError: no image has a mask."""
        stems = {_normal(splitext(image)[0]) for image in images}
        lonely = [(display_name(masks[s]), _LONELY_MASK) for s in sorted(masks.keys() - stems)]
        self.problems += lonely
        if not any(entry.mask for entry in self._entries):
            found = few(lonely) or "there are none"
            raise UserError(
                f"{self.config.mask_files}: none of the {len(self._entries)} images with captions "
                f"in {display_name(self._tree.root)} has a mask ({found}). A mask stands beside "
                "its image: cat.mask.png for cat.jpg."
            )

    def _captions_of_tables(
        self, tables: list[str], images: list[str], names: list[str]
    ) -> Captions:
        """Captions from metadata files, whose file names start from where each file is."""
        by_name, known = _Names(images), _Names(names)
        captions: Captions = {}
        for table in tables:
            label = display_name(table)
            rows = read_table(self._read_table(table), label, self.config.caption_column)
            if not rows:
                continue
            columns = list(dict.fromkeys(key for row in rows for key in row))
            if "file_name" not in columns:
                raise UserError(
                    f"{label} has no column file_name; it has {', '.join(columns)}."
                    f"{did_you_mean('file_name', columns)} {_FORMATS}"
                )
            column = choose_caption_column(columns, self.config.caption_column, label)
            for number, row in enumerate(rows, start=1):
                given = str(row.get("file_name") or "").strip()
                path = join(dirname(table), given)
                if image := by_name.find(path):
                    # Several lines for one image are several captions of it.
                    texts = (*captions.get(image, ()), *clean_captions(row.get(column)))
                    captions[image] = tuple(dict.fromkeys(texts))
                else:
                    where = f"{table} entry {number}"
                    reason = self._why_no_image(given, exists=known.find(path) is not None)
                    self._skip(given or where, f"{reason} (named by {where})")
        return captions

    def _why_no_image(self, given: str, exists: bool) -> str:
        if not given:
            return "no file_name"
        if not exists:
            return "not in the folder"
        if self.config.mask_files and _mask_stem(given):
            return "the mask of another image, as its name says"
        ending = splitext(given)[1] or "nothing"
        return (
            f"not taken for an image, as its name ends in {ending} and not in one of "
            f"{', '.join(IMAGE_ENDINGS)}"
        )

    def _captions_beside(self, images: list[str], names: list[str]) -> Captions:
        """Captions from text files: cat.txt, cat.png.txt or the same with .caption for cat.png."""
        files, captions = _Names(names), Captions()
        beside = {
            image: [stem + end for end in _TEXT_ENDINGS for stem in (splitext(image)[0], image)]
            for image in images
        }
        own = {
            image: next(filter(None, map(files.exactly, texts)), None)
            for image, texts in beside.items()
        }
        taken = set(own.values())
        for image, texts in beside.items():
            others = (file for file in map(files.find, texts) if file and file not in taken)
            file = own[image] or next(others, None)
            if file is None:
                continue
            try:
                text = decode_text(self._tree.read(file, MAX_CAPTION_BYTES))
                lines = clean_captions(text.splitlines())
                joined = self.config.caption_lines == "joined"
                captions[image] = clean_captions(" ".join(lines)) if joined else lines
            except (*READ_ERRORS, ValueError) as error:
                self._why_none[image] = f"its caption {display_name(file)} cannot be read ({error})"
        return captions

    def _read_table(self, table: str) -> bytes:
        try:
            return self._tree.read(table, MAX_TABLE_BYTES)
        except READ_ERRORS as error:
            raise UserError(f"{display_name(table)} cannot be read ({error}).") from error

    def _nothing_usable(self, count: int, has_table: bool) -> str:
        root = display_name(self._tree.root)
        reasons = {reason for _, reason in self.problems} - {"no caption", _UNUSED_MASK}
        if not has_table and not reasons:
            kohya = next((name for name, _ in self.problems if repeats(name)[1]), None)
            hint = (
                f" {dirname(kohya)} looks like kohya's: data.repeat_folders=true." if kohya else ""
            )
            return f"{root} has {count} images but no captions.{hint} {_FORMATS}"
        return f"{root}: 0 usable images of {count} ({few(self.problems)}). {_FORMATS}"


class _Names:
    """Files by name, as on Windows and macOS: case and Unicode form may differ."""

    def __init__(self, files: Iterable[str]) -> None:
        self._exact = {_normal(file): file for file in files}
        self._alike: dict[str, list[str]] = {}
        for file in self._exact.values():
            self._alike.setdefault(_alike(file), []).append(file)

    def exactly(self, name: str) -> str | None:
        """The file of that name, or None."""
        return self._exact.get(_normal(name))

    def find(self, name: str) -> str | None:
        """The same, or the only file whose name differs in upper and lower case."""
        found = self._alike.get(_alike(name), ())
        return self.exactly(name) or (found[0] if len(found) == 1 else None)


def unused_files(config: DataConfig) -> list[Skipped]:
    """Name the files of a folder that `FolderSource` never looks at, and why."""
    names = open_tree(config.path or "", config.follow_links).names()
    images = [name for name in names if name.lower().endswith(IMAGE_ENDINGS)]
    tables = {name for name in names if basename(name).lower() in METADATA_NAMES}
    partners = {_alike(name) for image in images for name in (image, splitext(image)[0])}
    unused = []
    for name in sorted(set(names).difference(images, tables)):
        stem, ending = splitext(name)
        if ending.lower() not in _TEXT_ENDINGS:
            reason = f"files ending in {ending or 'nothing'} are not looked for"
        elif _alike(stem) not in partners:
            reason = "a text without an image"
        elif tables:
            reason = "captions are taken from the metadata file, not from texts"
        else:
            continue
        unused.append((display_name(name), reason))
    return unused


def repeats(name: str) -> tuple[int, str]:
    """How often an epoch has an image, and what it shows, by a folder named like 10_a dog.

    Returns: (1, "") where its folder is named otherwise.
    """
    found = _REPEATS.fullmatch(_normal(name))
    return (max(1, int(found[1])), found[2]) if found else (1, "")


def _words(name: str) -> str:
    return splitext(basename(name))[0].replace("_", " ")


def _alike(name: str) -> str:
    """The same for names that people take for one: whatever their upper and lower case."""
    return _normal(name).casefold()


def _mask_stem(name: str) -> str:
    """The name, without ending, of the image that a mask file belongs to; "" for others."""
    return name[: -len(MASK_ENDING)] if name.lower().endswith(MASK_ENDING) else ""


def _normal(path: str) -> str:
    """Make names comparable: macOS stores é as two characters, Windows writes a\\b for a/b."""
    return unicodedata.normalize("NFC", path.replace("\\", "/")).removeprefix("./")


def _no_images(root: str, names: list[str], problems: list[Skipped]) -> str:
    endings = Counter(splitext(name)[1].lower() or "(no ending)" for name in names)
    found = ", ".join(f"{n} × {ending}" for ending, n in endings.most_common(5)) or "nothing"
    return (
        f"no images in {display_name(root)} or below it (found: {found}). Looked for files ending "
        f"in {', '.join(IMAGE_ENDINGS)}; convert others, such as .heic, first.{left_out(problems)}"
    )
