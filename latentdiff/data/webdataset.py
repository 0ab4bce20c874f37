"""Tar shards in WebDataset's layout, read in place: `0001.jpg` and `0001.txt` side by side.

The headers are read once, so every image has a known place in its file and can be met in any
order: training on shards is as repeatable as on a folder. In memory are some tens of bytes per
image and the captions.

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
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from latentdiff.data.captions import (
    MAX_CAPTION_BYTES,
    Texts,
    choose_caption_column,
    decode_text,
)
from latentdiff.data.file_tree import MAX_IMAGE_BYTES, check_size, find_files
from latentdiff.data.images import IMAGE_ENDINGS, UnreadableImage, display_name
from latentdiff.data.source import DataConfig, FileSource, Skipped, few, left_out
from latentdiff.errors import UserError

_MASK_ENDING = "mask.png"


class _Place(NamedTuple):
    """Where the bytes of a member are: which shard, from where, how many."""

    shard: int
    offset: int
    size: int


class TarSource(FileSource):
    """Captioned images in .tar files.

    Left out are samples without an image or a caption, and shards that are damaged from some place
    on.
    Raises: UserError: no shards, a compressed one, or no usable sample.
    """

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        self._shards, self.problems = _shards(config.path or "", config.follow_links)
        self._sizes = [shard.stat().st_size for shard in self._shards]
        self._places, self._masks = array("q"), array("q")  # shard, offset, size of each
        self._captions, self._names = Texts(), Texts()
        for number, shard in enumerate(self._shards):
            for key, sample in groupby(self._members(number), key=itemgetter(0)):
                members = {ending: place for _, ending, place in sample}
                self._add(f"{shard.stem}/{display_name(key)}", members)
        if not len(self._names):
            raise UserError(
                f"{config.path}: 0 usable images in {len(self._shards)} shards "
                f"({few(self.problems) or 'they are empty'}). A sample is an image and a .txt or "
                ".json of the same name: 0001.jpg, 0001.txt."
            )
        if config.mask_files and max(self._masks[::3]) < 0:
            raise UserError(
                f"{config.mask_files}: none of the {len(self)} images in {config.path} has a "
                f"mask. A mask stands beside its image: 0001.{_MASK_ENDING} for 0001.jpg."
            )

    def __len__(self) -> int:
        return len(self._names)

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of one image."""
        return self._captions[index]

    def name(self, index: int) -> str:
        """Return shard and sample name."""
        return self._names[index][0]

    def fingerprint(self) -> str:
        """Hash names, places and the shards' sizes and times; reads none of the images."""
        digest = hashlib.blake2b(bytes(self.config.background), digest_size=16)
        for shard in self._shards:
            status = shard.stat()
            digest.update(f"{shard.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        digest.update(self._places.tobytes() + self._masks.tobytes())
        return digest.hexdigest()

    def read(self, index: int) -> bytes:
        """Return the bytes of one image's file. Raises: UnreadableImage."""
        return self._read(self._places, index)

    def read_mask(self, index: int) -> bytes | None:
        """Return those of its mask. Raises: UnreadableImage."""
        return self._read(self._masks, index) if self._masks[3 * index] >= 0 else None

    def _members(self, number: int) -> Iterator[tuple[str, str, _Place]]:
        """Sample name, ending and place of each file of one shard."""
        path = self._shards[number]
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    # tarfile remembers every header it has seen; a shard may hold a million.
                    tar.members = []  # type: ignore[attr-defined]
                    folder, _, file = member.name.rpartition("/")
                    stem, _, ending = file.partition(".")
                    if member.isfile() and stem:  # .DS_Store and the like have none
                        key = f"{folder}/{stem}" if folder else stem
                        yield key, ending.lower(), _Place(number, member.offset_data, member.size)
                if tar.offset + tarfile.BLOCKSIZE > self._sizes[number]:  # no end-of-archive block
                    self.problems.append((path.name, "cut off; what is whole is used"))
        except (tarfile.TarError, OSError, EOFError) as error:
            self.problems.append((path.name, f"cannot be read from some place on ({error})"))

    def _add(self, name: str, members: dict[str, _Place]) -> None:
        mask = members.pop(_MASK_ENDING, None)
        image = next((p for e, p in members.items() if f".{e}".endswith(IMAGE_ENDINGS)), None)
        if image is None:
            self.problems.append((name, "a mask without its image" if mask else "no image"))
            return
        if image.offset + image.size > self._sizes[image.shard]:
            self.problems.append((name, "the shard ends before it does"))
            return
        captions = self.captions_or_skip(name, lambda: self._read_captions(members, name))
        if not captions:
            return
        self._places.extend(image)
        if mask is None or not self.config.mask_files:
            mask = _Place(-1, 0, 0)
        self._masks.extend(mask)
        self._captions.append(captions)
        self._names.append((name,))

    def _read_captions(self, members: dict[str, _Place], name: str) -> object:
        """A sample's captions: lines of its .txt, or a column of its .json."""
        for ending in ("txt", "caption", "text"):
            if ending in members and self.config.caption_column is None:
                text = self._bytes(members[ending], MAX_CAPTION_BYTES)
                return decode_text(text).splitlines()
        if "json" not in members:
            return None
        row = json.loads(decode_text(self._bytes(members["json"], MAX_CAPTION_BYTES)))
        if not isinstance(row, dict):
            raise ValueError("its .json is not an object")
        where = f"the .json of {name}"
        return row[choose_caption_column(list(row), self.config.caption_column, where)]

    def _read(self, places: array[int], index: int) -> bytes:
        try:
            return self._bytes(_Place(*places[3 * index : 3 * index + 3]))
        except OSError as error:
            raise UnreadableImage(self.name(index), f"cannot be read ({error})") from error

    def _bytes(self, place: _Place, limit: int = MAX_IMAGE_BYTES) -> bytes:
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
        raise UserError(
            f"data.path: no .tar shards at {path}. Give a folder, a file or a pattern such as "
            f"'shards/*.tar'.{left_out(problems)}"
        )
    packed = [shard.name for shard in found if shard.suffix != ".tar"]
    if packed:
        raise UserError(
            f"{', '.join(packed[:5])}: shards must be plain .tar files, so that images can be "
            "read from their place; unpack compressed ones (gunzip). Images gain nothing by it."
        )
    return found, problems
