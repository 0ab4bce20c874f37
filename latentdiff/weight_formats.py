"""What a file that should hold weights is, by its first bytes: its name may say otherwise."""

from __future__ import annotations

import codecs
import zipfile
from pathlib import Path
from typing import Literal

from latentdiff.errors import UserError

#: Endings of the files that are pickles, when nothing in them says what they are.
PICKLES = (".ckpt", ".bin", ".pt", ".pth")
_AGAIN = "Download it again"
_UNPACK = "Unpack it, and name the file in it"
#: How a file begins → what it is, what to do.
_OTHERS: dict[bytes, tuple[str, str]] = {
    b"version https://git-lfs": (
        "a Git LFS pointer, which stands for the file of weights and holds none of it",
        "Run `git lfs pull`, or download the file itself",
    ),
    b"GGUF": ("a GGUF file, of quantised weights", "Ask for it as safetensors"),
    b"\x89HDF": ("an HDF5 file (Keras)", "Ask for it as safetensors"),
    b"\x89PNG": ("a PNG picture", _AGAIN),
    b"\xff\xd8\xff": ("a JPEG picture", _AGAIN),
    b"RIFF": ("a WebP picture", _AGAIN),
    b"GIF8": ("a GIF picture", _AGAIN),
    b"\x1f\x8b": ("a gzip archive", _UNPACK),
    b"7z\xbc\xaf": ("a 7-Zip archive", _UNPACK),
    b"Rar!": ("a RAR archive", _UNPACK),
    b"\xfd7zXZ": ("an xz archive", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("a Zstandard archive", _UNPACK),
}


def weights_format(file: Path) -> Literal["safetensors", "pickle"]:
    """How the file is to be read.

    Raises: OSError: it cannot be read.  UserError: it is something else, which is named.
    """
    with file.open("rb") as opened:
        head = opened.read(512)
    if other := _other(file, head):
        what, advice = other
        raise UserError(f"{file} cannot be read: it is {what}. {advice}.")
    # A header's length, which is at most 100 MB, and the beginning of the header.
    if head[4:9] == b"\0\0\0\0{":
        return "safetensors"
    ending = file.suffix.lower()
    is_pickle = head.startswith((b"PK\3\4", b"\x80"))
    if is_pickle and ending == ".safetensors":  # which torch.load goes by
        raise UserError(
            f"{file} is a pickle of PyTorch, not safetensors. Rename it to end in .ckpt."
        )
    return "pickle" if is_pickle or ending in PICKLES else "safetensors"


def _other(file: Path, head: bytes) -> tuple[str, str] | None:
    if not head:
        return "empty", _AGAIN
    if head[4:9] == b"\0\0\0\0{":
        return None
    if len(head) > 8 and not any(head):
        return "nothing but zeros at its beginning, as in an unfinished download", _AGAIN
    for start, other in _OTHERS.items():
        if head.startswith(start):
            return other
    if head.startswith(b"PK"):
        return _other_archive(file)
    text = _text(head)
    if text.startswith("<"):
        return "a web page, with which a server answered", f"{_AGAIN}, where needed logged in"
    return (f"a text, which begins {text[:60]!r}", _AGAIN) if text else None


def _other_archive(file: Path) -> tuple[str, str] | None:
    """What a ZIP archive is, unless it is what PyTorch writes."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile:
        return "an archive that was cut off or damaged", _AGAIN
    names = [entry.filename for entry in entries]
    if any(name.endswith("constants.pkl") for name in names):
        return "a TorchScript program", "Ask for its weights as safetensors"
    if not any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        some = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
        return f"a ZIP archive ({some or 'empty'})", _UNPACK
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        return (
            "a compressed archive of a pickle",
            "Save it with torch.save, which compresses nothing",
        )
    return None


def _text(head: bytes) -> str:
    """The beginning of a file of text; empty when it is none."""
    try:
        # A character may be cut in two.
        words = codecs.getincrementaldecoder("utf-8-sig")().decode(head)
    except UnicodeDecodeError:
        return ""
    is_text = all(sign.isprintable() or sign.isspace() for sign in words)
    return words.strip() if is_text and len(words) > 8 else ""
