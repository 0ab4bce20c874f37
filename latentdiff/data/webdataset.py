"""Tar shards in WebDataset's layout, read in place: `0001.jpg` and `0001.txt` side by side.

The headers are read once, so every picture has a known place in its file and can be met in any
order: training on shards is as repeatable as on a folder. In memory are some tens of bytes per
picture and the captions.

Source: the format is that of https://github.com/webdataset/webdataset: members of the same name up
        to the first dot after the last slash are one sample, and stand one after another.
"""

from __future__ import annotations

import glob
import hashlib
import json
import tarfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from latentdiff.data.captions import (
    MAX_CAPTION_BYTES,
    Texts,
    choose_caption_column,
    clean_captions,
    decode_text,
)
from latentdiff.data.folder import MAX_PICTURE_BYTES, check_size, find_files
from latentdiff.data.images import (
    IMAGE_ENDINGS,
    UnreadableImage,
    display_name,
    open_grey,
    open_image,
    open_with_alpha,
)
from latentdiff.data.source import DataConfig, Example, Skipped, few
from latentdiff.errors import UserError

_MASK_ENDING = "mask.png"


class _Place(NamedTuple):
    """Where the bytes of a member are: which shard, from where, how many."""

    shard: int
    offset: int
    size: int


class TarSource:
    """Captioned pictures in .tar files.

    Attributes: problems: (name, reason) of samples without a picture or a caption, and of shards
        that are damaged from some place on.
    Raises: UserError: no shards, a compressed one, or no usable sample.
    """

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._shards, self.problems = _shards(config.path or "", config.follow_links)
        self._sizes = [shard.stat().st_size for shard in self._shards]
        self._places, self._masks = array("q"), array("q")  # shard, offset, size of each
        self._captions, self._names = Texts(), Texts()
        for number in range(len(self._shards)):
            for key, members in self._samples(number):
                self._add(number, key, members)
        if not len(self._names):
            raise UserError(
                f"{config.path}: 0 usable pictures in {len(self._shards)} shards "
                f"({few(self.problems) or 'they are empty'}). A sample is a picture and a .txt or "
                ".json of the same name: 0001.jpg, 0001.txt."
            )
        if config.loss_mask == "file" and max(self._masks[::3]) < 0:
            raise UserError(
                f"data.loss_mask=file: none of the {len(self)} pictures in {config.path} has a "
                f"mask. A mask stands beside its picture: 0001.{_MASK_ENDING} for 0001.jpg."
            )

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Example:
        name, data = self.name(index), self._read(self._place(self._places, index), index)
        captions, ground = self.captions(index), self._config.background
        if self._config.loss_mask == "alpha":
            image, alpha = open_with_alpha(data, name, ground)
            return Example(image, captions, name, alpha)
        mask = self._mask(index)
        grey = open_grey(mask, f"{name} ({_MASK_ENDING})") if mask is not None else None
        return Example(open_image(data, name, ground), captions, name, grey)

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of one picture."""
        return self._captions[index]

    def name(self, index: int) -> str:
        """Return shard and sample name."""
        return self._names[index][0]

    def content_key(self, index: int) -> str:
        """Hash the picture's bytes and the background. Raises: UnreadableImage."""
        digest = hashlib.blake2b(
            self._read(self._place(self._places, index), index), digest_size=16
        )
        digest.update(bytes(self._config.background))
        digest.update(self._mask(index) or b"")
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """Hash names, places and the shards' sizes and times; reads none of the pictures."""
        digest = hashlib.blake2b(bytes(self._config.background), digest_size=16)
        for shard in self._shards:
            status = shard.stat()
            digest.update(f"{shard.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        digest.update(self._places.tobytes() + self._masks.tobytes())
        return digest.hexdigest()

    def _samples(self, number: int) -> Iterator[tuple[str, dict[str, _Place]]]:
        """Sample name → {ending: place} of one shard."""
        path, key, members = self._shards[number], "", dict[str, _Place]()
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    # tarfile remembers every header it has seen; a shard may hold a million.
                    tar.members = []  # type: ignore[attr-defined]
                    if not member.isfile():
                        continue
                    folder, _, file = member.name.rpartition("/")
                    stem, _, ending = file.partition(".")
                    found = f"{folder}/{stem}" if folder else stem
                    if found != key and members:
                        yield key, members
                        members = {}
                    key = found
                    if stem:  # .DS_Store and the like have none
                        place = _Place(number, member.offset_data, member.size)
                        members[ending.lower()] = place
                if tar.offset + tarfile.BLOCKSIZE > self._sizes[number]:  # no end-of-archive block
                    self.problems.append((path.name, "cut off; what is whole is used"))
        except (tarfile.TarError, OSError, EOFError) as error:
            self.problems.append((path.name, f"cannot be read from some place on ({error})"))
        if members:
            yield key, members

    def _add(self, number: int, key: str, members: dict[str, _Place]) -> None:
        name = f"{self._shards[number].stem}/{display_name(key)}"
        mask = members.pop(_MASK_ENDING, None) if self._config.loss_mask == "file" else None
        picture = next((p for e, p in members.items() if f".{e}".endswith(IMAGE_ENDINGS)), None)
        if picture is None:
            self.problems.append((name, "a mask without its picture" if mask else "no picture"))
            return
        if picture.offset + picture.size > self._sizes[number]:
            self.problems.append((name, "the shard ends before it does"))
            return
        try:
            captions = self._said(members, name)
        except (OSError, ValueError, RecursionError) as error:
            self.problems.append((name, f"its caption cannot be read ({error})"))
            return
        if not captions:
            self.problems.append((name, "no caption"))
            return
        self._places.extend(picture)
        self._masks.extend(mask or _Place(-1, 0, 0))
        self._captions.append(captions)
        self._names.append((name,))

    def _said(self, members: dict[str, _Place], name: str) -> tuple[str, ...]:
        """A sample's captions: lines of its .txt, or a column of its .json."""
        for ending in ("txt", "caption", "text"):
            if ending in members and self._config.caption_column is None:
                text = self._bytes(members[ending], MAX_CAPTION_BYTES)
                return clean_captions(decode_text(text).splitlines())
        if "json" not in members:
            return ()
        row = json.loads(decode_text(self._bytes(members["json"], MAX_CAPTION_BYTES)))
        if not isinstance(row, dict):
            raise ValueError("its .json is not an object")
        where = f"the .json of {name}"
        return clean_captions(
            row[choose_caption_column(list(row), self._config.caption_column, where)]
        )

    def _place(self, places: array[int], index: int) -> _Place:
        return _Place(*places[3 * index : 3 * index + 3])

    def _mask(self, index: int) -> bytes | None:
        place = self._place(self._masks, index)
        return self._read(place, index) if place.shard >= 0 else None

    def _read(self, place: _Place, index: int) -> bytes:
        try:
            return self._bytes(place)
        except OSError as error:
            raise UnreadableImage(self.name(index), f"cannot be read ({error})") from error

    def _bytes(self, place: _Place, limit: int = MAX_PICTURE_BYTES) -> bytes:
        check_size(place.size, limit)
        with open(self._shards[place.shard], "rb") as file:
            file.seek(place.offset)
            data = file.read(place.size)
        if len(data) < place.size:
            raise OSError("the shard ends before it does")
        return data


def _shards(path: str, follow_links: bool) -> tuple[list[Path], list[Skipped]]:
    """The .tar files of a folder, a pattern or a single path, in the order of their names.

    Returns: paths; and (name, reason) of links in the folder that are not followed.
    """
    place = Path(path).expanduser()
    problems: list[Skipped] = []
    if place.is_dir():
        found, problems = find_files(place, ("*.tar*", "*.tgz"), follow_links)
    elif place.exists():
        found = [place]
    else:
        found = [Path(name) for name in sorted(glob.glob(str(place)))]
    if not found:
        left_out = f" Left out: {few(problems)}." * bool(problems)
        raise UserError(
            f"data.path: no .tar shards at {path}. Give a folder, a file or a pattern such as "
            f"'shards/*.tar'.{left_out}"
        )
    packed = [shard.name for shard in found if shard.suffix != ".tar"]
    if packed:
        raise UserError(
            f"{', '.join(packed[:5])}: shards must be plain .tar files, so that pictures can be "
            "read from their place; unpack compressed ones (gunzip). Pictures gain nothing by it."
        )
    return found, problems
