"""One picture: its file, its pixels and its captions → a record."""

from __future__ import annotations

import hashlib
import io
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from latentdiff.data.images import RGB, UnreadableImage, open_image
from latentdiff.data.source import Source
from latentdiff.doctor.likeness import outline_and_colours
from latentdiff.doctor.records import ANIMATED, ONE_COLOUR, READABLE, ROTATED, TRANSPARENT
from latentdiff.doctor.records import WRONG_ENDING as WRONG
from latentdiff.doctor.tokens import TokenCounter

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


def look_at(
    source: Source, index: int, background: RGB, counter: TokenCounter
) -> tuple[dict[str, Any], str | None]:
    """Read, decode and measure one picture exactly as training would.

    Returns: facts for `Records.put`, and why the picture cannot be read (None when it can).
    """
    facts = _captions(source.captions(index), counter)
    read = getattr(source, "read", None)
    try:
        if callable(read):
            data = read(index)
            facts["digest"] = _digest(data)
            image = open_image(data, source.name(index), background)
            facts |= _header(data, source.name(index))
        else:  # a source that draws its pictures, or keeps the files to itself
            image = source[index].image
            facts |= {"digest": _digest(image.tobytes()), "mode": image.mode, "format": "drawn"}
    except UnreadableImage as error:
        return facts | {"flags": 0}, error.reason
    outline, colours, one_colour = outline_and_colours(image)
    flags = facts.get("flags", 0) | READABLE | ONE_COLOUR * one_colour
    size = {"width": image.width, "height": image.height}
    return facts | size | {"outline": outline, "colours": colours, "flags": flags}, None


def _captions(captions: tuple[str, ...], counter: TokenCounter) -> dict[str, Any]:
    counts = [counter.count(text) for text in captions]
    return {
        "captions": min(255, len(counts)),
        "longest": max(counts, default=0),
        "too_long": sum(count > counter.limit for count in counts),
    }


def _header(data: bytes, name: str) -> dict[str, Any]:
    """What a file says about itself, without decoding it a second time."""
    with Image.open(io.BytesIO(data)) as image:
        flags = ANIMATED * _safe(lambda: getattr(image, "is_animated", False))
        flags |= ROTATED * _safe(lambda: _is_rotated(image))
        flags |= TRANSPARENT * image.has_transparency_data
        kind = image.format or "?"
        ending = PurePosixPath(name).suffix.lower()
        wrong = ending in _ALL_ENDINGS and ending not in _ENDINGS.get(kind, ())
        return {"mode": image.mode, "format": kind, "flags": flags | WRONG * wrong}


def _is_rotated(image: Image.Image) -> bool:
    # Asking a PNG that has no such entry would decode it to look behind the pixels.
    known = image.format != "PNG" or "exif" in image.info
    return known and image.getexif().get(_ORIENTATION, 1) in range(2, 9)


def _safe(ask: Any) -> bool:
    """Ask a decoder; broken data beside good pixels raises nearly anything."""
    try:
        return bool(ask())
    except Exception:
        return False


def _digest(data: bytes) -> Any:
    return np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), np.uint8)
