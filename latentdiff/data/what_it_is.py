"""What a file that is named like a picture really holds, in words for the person who named it."""

from __future__ import annotations

import os

#: How a file begins → what it is, and what helps. Compared in small letters, without leading space.
_BEGINNINGS = (
    (b"version https://git-lfs", "a Git LFS pointer; fetch the picture itself with `git lfs pull`"),
    (b"<!doctype html", "a web page, perhaps of a failed download; fetch the picture again"),
    (b"<html", "a web page, perhaps of a failed download; fetch the picture again"),
    (b"<svg", "an SVG drawing; export it as a PNG"),
    (b"%pdf", "a PDF document; export its picture as a PNG"),
    (b"pk\x03\x04", "a ZIP archive (or an office document); unpack it"),
    (b"mz\x90", "a Windows program"),
)
#: Bytes 4 to 12 of a file from a phone.
_HEIC = (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1", b"ftyphevc")
_LOOKED_AT = 512


def what_it_is(source: str | os.PathLike[str] | bytes) -> str:
    """Name what a file is instead of a picture, e.g. "a text file"; "" where nobody can tell.

    Args: source: a path, or the bytes of a file; only its beginning is looked at.
    """
    if isinstance(source, bytes):
        head = source[:_LOOKED_AT]
    else:
        try:
            with open(source, "rb") as file:
                head = file.read(_LOOKED_AT)
        except OSError:
            return ""
    if head[4:12] in _HEIC:
        return "an HEIC picture, which Pillow cannot read; convert it to JPEG or PNG"
    small = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for beginning, name in _BEGINNINGS:
        if small.startswith(beginning):
            return name
    if small.startswith(b"<?xml") and b"<svg" in small:
        return "an SVG drawing; export it as a PNG"
    return f"a text file that begins with {shown!r}" if (shown := _as_text(head)) else ""


def _as_text(head: bytes) -> str:
    """The first line of a text, cut short; "" for what is no text."""
    # The last character may be cut in two where the beginning ends.
    text = head.decode("utf-8", "ignore" if len(head) == _LOOKED_AT else "replace")
    lines = text.strip().splitlines()
    whole = all(c.isprintable() or c.isspace() for c in text) and "\ufffd" not in text
    return lines[0][:40] if lines and whole else ""
