"""Short hashes of models and adapters, by which an image says what made it."""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from latentdiff.files import default_cache, read_json, write_json
from latentdiff.formats.folder import PARTS
from latentdiff.tensor_file import ENDINGS
from latentdiff.weights import TEXT_STEM, UNET_STEM, raw_bytes, weight_files

#: Files from this size on are hashed once, and the hash kept.
_LARGE = 64 * 2**20


def model_name(source: str) -> str:
    """What a model is called, without where it is: a hub id, or a file's or folder's own name."""
    path = Path(source)
    if not path.exists():
        return source
    return path.stem if path.suffix.lower() in ENDINGS else path.resolve().name


def model_hash(source: Path, variant: str | None = None) -> str:
    """Ten digits for the content of a model.

    Of a single file those of its SHA-256, as A1111 shows them. Of a folder those of the SHA-256 of
    the lines `name hash`, sorted, for the files of weights that are read and for the parts' JSON.
    """
    if source.is_file():
        return file_hash(source)[:10]
    files = [*source.glob("*/*.json")]
    for part, stem in (("unet", UNET_STEM), ("vae", UNET_STEM), ("text_encoder", TEXT_STEM)):
        files += weight_files(source / part, stem, variant)
    names = {
        file.relative_to(source).as_posix(): file for file in files if file.parent.name in PARTS
    }
    lines = [f"{name} {file_hash(file)}\n" for name, file in sorted(names.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:10]


def weights_hash(module: nn.Module) -> str:
    """Ten digits for a network's weights, in the order of their names."""
    digest = hashlib.sha256()
    for _, tensor in sorted(module.state_dict().items()):
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()[:10]


def file_hash(file: Path) -> str:
    """A file's SHA-256 in hex digits; that of a large one is kept in the user's cache until the
    file changes."""
    real, cache = file.resolve(), default_cache() / "hashes.json"
    if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name):
        return real.name  # so the cache of the Hugging Face hub names files
    state = real.stat()
    key = [state.st_size, state.st_mtime_ns]
    if state.st_size < _LARGE:
        return _sha256(real)
    known: dict[str, Any] = {}
    with suppress(ValueError):  # none yet, or damaged
        known = read_json(cache)
    if known.get(str(real), [])[:2] != key:
        known[str(real)] = [*key, _sha256(real)]
        with suppress(OSError):  # a read-only home
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_json(cache, known)
    return str(known[str(real)][2])


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
