"""What a file really holds, by its first bytes; its name may say otherwise."""

from __future__ import annotations

import codecs

#: So many bytes are looked at.
HEAD = 512
_AGAIN = "Download it again"
_WEIGHTS = "Ask for it as safetensors"
_UNPACK = "Unpack it"
#: How a file begins → what it is, what to do. Compared in small letters, without leading space.
_BEGINNINGS = {
    b"version https://git-lfs": (
        "a Git LFS pointer, which stands for the file and holds none of it",
        "Run `git lfs pull`, or download the file itself",
    ),
    b"%pdf": ("a PDF document", "Export its image as a PNG"),
    b"mz\x90": ("a Windows program", _AGAIN),
    b"gguf": ("a GGUF file, of quantised weights", _WEIGHTS),
    b"\x89hdf": ("an HDF5 file (Keras)", _WEIGHTS),
    b"pk\x03\x04": ("a ZIP archive (or an office document)", _UNPACK),
    b"\x1f\x8b": ("a gzip archive", _UNPACK),
    b"7z\xbc\xaf": ("a 7-Zip archive", _UNPACK),
    b"rar!": ("a RAR archive", _UNPACK),
    b"\xfd7zxz": ("an xz archive", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("a Zstandard archive", _UNPACK),
}
#: Bytes 4 to 12 of a file from a phone.
_HEIC = (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1", b"ftyphevc")
#: How images begin that Pillow reads.
IMAGES = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"RIFF": "a WebP image",
    b"GIF8": "a GIF image",
}


def sniff(head: bytes) -> tuple[str, str] | None:
    """Name what is neither an image nor weights, e.g. ("a web page", "Download it again").

    Args:    head: the first `HEAD` bytes of a file, or all of a shorter one.
    Returns: what it is, and what to do or ""; None where nobody can tell.
    """
    if not head:
        return "empty", _AGAIN
    if len(head) > 8 and not any(head):
        return "a file that begins with zeros only, as an unfinished download does", _AGAIN
    if head[4:12] in _HEIC:
        return "an HEIC image, which Pillow cannot read", "Convert it to JPEG or PNG"
    small = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    for beginning, found in _BEGINNINGS.items():
        if small.startswith(beginning):
            return found
    if small.startswith(b"<"):
        if b"<svg" in small:
            return "an SVG drawing", "Export it as a PNG"
        return "a web page, probably a server's answer", f"{_AGAIN}, logged in if that needs it"
    line = _first_line(head)
    return (f"a text file that begins with {line!r}", "") if line else None


def _first_line(head: bytes) -> str:
    """The first line of a text, cut short; "" for what is no text."""
    try:
        # A character may be cut in two where the beginning ends.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head, final=len(head) < HEAD)
    except UnicodeDecodeError:
        return ""
    is_text = all(sign.isprintable() or sign.isspace() for sign in text)
    return text.strip().partition("\n")[0].strip()[:40] if is_text else ""
