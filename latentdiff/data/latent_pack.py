"""A latent cache as one safetensors file, for machines without `datasets` or the pictures.

Tensors: `moments` float16 (N, 2C, h, w) and `text`, the UTF-8 bytes of a JSON object with the lists
names, groups and captions (a list per picture).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentdiff.atomic import atomic_file
from latentdiff.data.latent_cache import LatentCache, Stored
from latentdiff.data.source import Skipped
from latentdiff.errors import UserError

_FORMAT = "latentdiff-latent-pack-1"


class LatentPack:
    """Reads like `LatentCache`: length, items, moments_of, captions, name, group, fingerprint.

    Raises: UserError: no such file, or not a pack.
    """

    def __init__(self, path: str | Path) -> None:
        if not Path(path).is_file():
            raise UserError(f"the latent pack {path} does not exist.")
        try:
            tensors = load_file(path)
            text = json.loads(bytes(tensors["text"].numpy()))
            self._moments, self._text = tensors["moments"], text
            complete = text["format"] == _FORMAT and len(text["names"]) == len(self._moments)
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise UserError(f"{path} is not a latent pack ({error!r}). Write it anew.") from error
        if not complete:
            raise UserError(f"{path} is not a latent pack of format {_FORMAT}. Write it anew.")
        c, h, w = self._moments.shape[1:]
        self.shape = (c, h, w)
        self.skipped: list[Skipped] = []

    def __len__(self) -> int:
        return len(self._moments)

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[str, ...], str]:
        """Return (moments float16 (2C, h, w), captions, name)."""
        return self._moments[index], self.captions(index), self.name(index)

    def read(self, indices: Sequence[int] | Tensor, seeds: Sequence[int] = ()) -> Stored:
        """Read many at once; a pack has no masks."""
        return Stored(self.moments_of(indices), None)

    def moments_of(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Read many at once: float16 (B, 2C, h, w), in the order asked for."""
        return self._moments[torch.as_tensor(np.asarray(indices, dtype=np.int64))]

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of one picture."""
        return tuple(self._text["captions"][index])

    def name(self, index: int) -> str:
        """Return the name of one picture."""
        return str(self._text["names"][index])

    def group(self, index: int) -> str:
        """Return the key that `split` keeps together."""
        return str(self._text["groups"][index])

    def fingerprint(self) -> str:
        """Return the fingerprint of the cache that the pack was written from."""
        return str(self._text["fingerprint"])


def write_pack(
    cache: LatentCache | LatentPack, path: str | Path, indices: Sequence[int] | None = None
) -> None:
    """Write a cache, or some of its entries, as one file; an existing file is replaced at once.

    Raises: UserError: when the file cannot be written.
    """
    chosen = range(len(cache)) if indices is None else indices
    if getattr(cache, "masked", False) or len({*getattr(cache, "buckets", ())}) > 1:
        raise UserError("a latent pack holds one shape and no masks; this cache has others.")
    text = {
        "format": _FORMAT,
        "fingerprint": cache.fingerprint() if indices is None else f"{cache.fingerprint()}-part",
        "names": [cache.name(i) for i in chosen],
        "groups": [cache.group(i) for i in chosen],
        "captions": [cache.captions(i) for i in chosen],
    }
    encoded = np.frombuffer(json.dumps(text).encode(), dtype=np.uint8).copy()
    tensors = {"moments": cache.moments_of(list(chosen)), "text": torch.from_numpy(encoded)}
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(Path(path)) as new:
            save_file(tensors, new)
    except (OSError, SafetensorError) as error:
        raise UserError(f"the latent pack cannot be written to {path} ({error}).") from error
