"""Files of learned words (textual inversion), of diffusers and of A1111.

    {token: vectors}                                       diffusers; .safetensors, .bin
    {"emb_params": vectors}                                .safetensors made by other tools
    {"string_to_param": {"*": vectors}, "name": token}     A1111; .pt

vectors are (width) or (n, width). What is written is the first, which A1111 opens too; there the
word is called as the file is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.files import written_file
from latentdiff.tensor_file import load_content
from latentdiff.weights import refuse_not_finite, save_tensors

#: What diffusers looks for in a folder.
FILE, PICKLE = "learned_embeds.safetensors", "learned_embeds.bin"
_NAMELESS = "emb_params"


class LearnedWord(NamedTuple):
    """A word and what it means to a text encoder."""

    token: str
    """How the file calls it."""
    vectors: Tensor
    """(n, width) float32."""


def read_embedding(path: str | Path) -> LearnedWord:
    """Read a file, or a folder with `FILE` or `PICKLE`.

    Raises:  UserError: not there, damaged, code in a pickle, another kind of file, named, or
             numbers that are not finite.
    """
    file = _find(Path(path).expanduser())
    data, _ = load_content(file)
    try:
        token, vectors = _pick(data, file)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise UserError(f"{file} is no textual inversion, or damaged ({error}).") from error
    if vectors.ndim == 1:
        vectors = vectors[None]
    if vectors.ndim != 2 or 0 in vectors.shape or not vectors.is_floating_point():
        raise UserError(
            f"{file} is no textual inversion: {token!r} is {tuple(vectors.shape)} of "
            f"{vectors.dtype}, not (vectors, width) of real numbers."
        )
    refuse_not_finite(file, {token: vectors})
    return LearnedWord(token, vectors.detach().float().clone())


def write_embedding(file: Path, token: str, vectors: Tensor) -> Path:
    """Write a word's vectors (n, width), for diffusers and A1111 too.

    Returns: the file.
    Raises:  UserError: it cannot be written; an older one is as it was.
    """
    tensors = {token: vectors.detach().to("cpu", torch.float32).contiguous()}
    with written_file(file) as new:
        save_tensors(tensors, new)
    return file


def _find(path: Path) -> Path:
    if path.is_dir():
        for name in (FILE, PICKLE):
            if (path / name).is_file():
                return path / name
        raise UserError(f"{path} holds neither {FILE} nor {PICKLE}. Name the file itself.")
    if not path.is_file():
        raise UserError(f"no textual inversion at {path}: this file does not exist.")
    return path


def _pick(data: Any, file: Path) -> tuple[str, Tensor]:
    if isinstance(data, Tensor):
        return file.stem, data
    if not isinstance(data, Mapping):
        raise UserError(f"{file} is no textual inversion: it holds a {type(data).__name__}.")
    if {"clip_l", "clip_g"} <= set(data):
        raise UserError(
            f"{file} is a textual inversion for SDXL (clip_l and clip_g). Only those for Stable "
            "Diffusion 1.x and 2.x can be used here."
        )
    inner = data.get("string_to_param", data)
    found = {str(k): v for k, v in inner.items() if isinstance(v, Tensor)} if inner else {}
    if len(found) != 1 or (inner is data and len(data) != 1):
        names = ", ".join(list(map(str, inner))[:4]) + (" …" if len(inner) > 4 else "")
        raise UserError(
            f"{file} is no textual inversion: it must hold the vectors of one word; it holds "
            f"{len(inner)} entries ({names})."
        )
    key, vectors = next(iter(found.items()))
    if inner is not data:
        key = str(data.get("name") or file.stem)
    return (file.stem if key == _NAMELESS else key), vectors


def embedding_and_token(text: str) -> tuple[str, str | None]:
    """("cat.pt", "<my-cat>") from "cat.pt=<my-cat>"; the token may be left out."""
    file, sign, token = text.rpartition("=")
    return (file, token) if sign and not Path(text).exists() else (text, None)
