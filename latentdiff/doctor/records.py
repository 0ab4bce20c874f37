"""One pass over the images: each is read, decoded and measured as training would, in threads.

Pillow decodes outside Python's global lock, so threads are enough, and nothing is copied between
processes. At any moment each thread holds one image, and large ones are decoded one at a time
(`images.LARGE_PIXELS`); what stays of an image is its record of 112 bytes, so that a million fit in
memory. Texts that only some images need (why one cannot be read) are kept apart.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from latentdiff.data.images import UnreadableImage
from latentdiff.data.source import FileSource, map_ahead
from latentdiff.doctor.likeness import outline_and_colours
from latentdiff.embedded import named
from latentdiff.files import read_json
from latentdiff.models.tokenizer import EOS, clip_tokenizer, load_tokenizer

Array = np.ndarray[Any, Any]
READABLE = 1
ANIMATED = 2
ROTATED = 4
TRANSPARENT = 8
ONE_COLOUR = 16
WRONG_ENDING = 32

RECORD = np.dtype(
    [
        ("width", np.int32),
        ("height", np.int32),
        ("longest", np.int32),  # tokens of the longest caption
        ("too_long", np.int32),  # captions over the limit
        ("flags", np.uint8),
        ("mode", np.uint8),  # Pillow's, as a number of Records.words
        ("format", np.uint8),  # of the content, likewise
        ("captions", np.uint8),  # how many, 255 for more
        ("digest", np.uint8, 16),  # of the file
        ("outline", np.uint8, 16),  # see likeness.outline_and_colours
        ("colours", np.uint8, 48),
    ],
    align=True,
)


class Records:
    """Records of all images of a source, filled in any order.

    Attributes:
        table: structured array (N,).
        reasons: why an image cannot be read, by index.
        words: what the numbers in the columns mode and format mean; RGB is 0.
    """

    def __init__(self, count: int) -> None:
        self.table = np.zeros(count, RECORD)
        self.reasons: dict[int, str] = {}
        self.words = ["RGB"]

    def __len__(self) -> int:
        return len(self.table)

    def put(self, index: int, facts: dict[str, Any], reason: str | None) -> None:
        """Store one image's facts, and why it cannot be read (None when it can)."""
        if reason is not None:
            self.reasons[index] = reason
        for name, value in facts.items():
            if isinstance(value, str):
                if value not in self.words:
                    self.words.append(value)
                value = self.words.index(value)
            self.table[index][name] = value

    def word(self, column: str, index: int) -> str:
        """The mode or format of one image."""
        return self.words[int(self.table[column][index])]

    @property
    def readable(self) -> Array:
        """Which images can be decoded: bool (N,)."""
        return self.table["flags"] & READABLE > 0

    def flagged(self, flag: int) -> Array:
        """Which readable images have a flag: bool (N,)."""
        return self.readable & (self.table["flags"] & flag > 0)


#: What CLIP's text encoder takes, begin and end token included.
CLIP_LIMIT = 77


@dataclass(frozen=True)
class TokenCounter:
    """A way of counting."""

    count: Callable[[str], int]
    """Text → tokens, begin and end token included."""
    limit: int
    """What the text encoder takes."""
    words: str
    """How the report calls it."""


def open_counter(folder: str | None, limit: int | None) -> TokenCounter:
    """Open a tokenizer.

    Args:    folder: a model folder, its tokenizer folder, or `embedded`; None: CLIP's own, which
             Stable Diffusion 1.x and 2.x have.
             limit: tokens that the text encoder takes; None asks the folder, else 77.
    Raises:  UserError: the folder holds no tokenizer.
    """
    if folder is None:
        count, words = clip_tokenizer(EOS).count, "counted by CLIP's own tokenizer"
        return TokenCounter(count, limit or CLIP_LIMIT, words)
    home = Path(named(folder)).expanduser()
    inner = home / "tokenizer"
    inner = inner if inner.is_dir() else home
    tokenizer = load_tokenizer(inner, limit or _positions(home) or CLIP_LIMIT)
    words = f"counted by the tokenizer in {inner}"
    return TokenCounter(tokenizer.count, limit or tokenizer.max_length, words)


def _positions(folder: Path) -> int | None:
    try:
        return int(read_json(folder / "text_encoder" / "config.json")["max_position_embeddings"])
    except (OverflowError, ValueError, KeyError, TypeError):  # UserError is a ValueError
        return None


def scan(source: FileSource, counter: TokenCounter, threads: int, progress: bool = True) -> Records:
    """Look at every image of a source once.

    Args: threads: images looked at at a time.   progress: whether to draw a bar.
    """
    from tqdm import tqdm

    records = Records(len(source))

    def look(index: int) -> tuple[dict[str, Any], str | None]:
        try:
            return look_at(source, index, counter)
        except Exception as error:  # one image must not end the examination of a million
            return {"flags": 0}, f"the examination failed ({type(error).__name__}: {error})"

    looked = map_ahead(look, range(len(source)), threads, 4 * threads)
    with warnings.catch_warnings():
        # Pillow warns of large images and broken EXIF; the bar would be torn, the report says it.
        warnings.filterwarnings("ignore", module=r"PIL\b")
        bar = tqdm(looked, "examining", len(source), unit="img", disable=not progress)
        for index, (facts, reason) in enumerate(bar):
            records.put(index, facts, reason)
    return records


def look_at(
    source: FileSource, index: int, counter: TokenCounter
) -> tuple[dict[str, Any], str | None]:
    """Read, decode and measure one image exactly as training would.

    Returns: facts for `Records.put`, and why the image cannot be read (None when it can).
    """
    counts = [counter.count(text) for text in source.captions(index)]
    facts: dict[str, Any] = {
        "captions": min(255, len(counts)),
        "longest": max(counts, default=0),
        "too_long": sum(count > counter.limit for count in counts),
    }
    try:
        data = source.read(index)
        image = source.decoded(index, data).image
    except UnreadableImage as error:
        return facts | {"flags": 0}, error.reason
    facts["digest"] = np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), np.uint8)
    facts |= _header(data, source.name(index))
    outline, colours, one_colour = outline_and_colours(image)
    flags = facts.get("flags", 0) | READABLE | ONE_COLOUR * one_colour
    size = {"width": image.width, "height": image.height}
    return facts | size | {"outline": outline, "colours": colours, "flags": flags}, None


_ORIENTATION = 0x0112
#: Endings by the format that a file of that name should hold.
_ENDINGS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "MPO": (".jpg", ".jpeg"),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
    "BMP": (".bmp", ".dib"),
    "DIB": (".bmp", ".dib"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
_ALL_ENDINGS = {ending for endings in _ENDINGS.values() for ending in endings}


def _header(data: bytes, name: str) -> dict[str, Any]:
    """What a file says about itself, without decoding it a second time."""
    with Image.open(io.BytesIO(data)) as image:
        flags = ANIMATED * _safe(lambda: getattr(image, "is_animated", False))
        flags |= ROTATED * _safe(lambda: _is_rotated(image))
        flags |= TRANSPARENT * image.has_transparency_data
        kind = image.format or "?"
        ending = PurePosixPath(name).suffix.lower()
        wrong = ending in _ALL_ENDINGS and ending not in _ENDINGS.get(kind, ())
        return {"mode": image.mode, "format": kind, "flags": flags | WRONG_ENDING * wrong}


def _is_rotated(image: Image.Image) -> bool:
    # Asking a PNG that has no such entry would decode it to look behind the pixels.
    known = image.format != "PNG" or "exif" in image.info
    return known and image.getexif().get(_ORIENTATION, 1) in range(2, 9)


def _safe(ask: Callable[[], Any]) -> bool:
    """Ask a decoder; broken data beside good pixels raises nearly anything."""
    try:
        return bool(ask())
    except Exception:
        return False
