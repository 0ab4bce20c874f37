"""Captions to text states, each caption encoded once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Encoder(Protocol):
    """What is needed of a text encoder."""

    def encode(self, captions: list[str]) -> Tensor:
        """Return text states (B, tokens, width)."""
        ...


#: Captions per call of the text encoder, always, on a CPU and elsewhere; see ContextCache.
CHUNK, LARGE_CHUNK = 8, 64


class ContextCache:
    """Text states of captions, the most recently used ones kept.

    The text encoder always gets the same number of captions (the last one repeated if need be).
    Matrix products of another size round differently, and after a resume the cache is empty: if the
    size were that of whatever is missing, the context would depend on the history of the run.

    Args:
        encoder: the frozen text encoder.
        max_bytes: how much memory the kept states may take.
    """

    def __init__(self, encoder: Encoder | Any, max_bytes: int = 2**30) -> None:
        self._encoder, self._max_bytes = encoder, max_bytes
        device = getattr(encoder, "device", torch.device("cpu"))
        self._chunk = CHUNK if device.type == "cpu" else LARGE_CHUNK
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        # Validation encodes its prompts while the batch thread is at work.
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Return the context of each caption, (B, tokens, width)."""
        with self._lock:
            missing = [c for c in dict.fromkeys(captions) if c not in self._kept]
            states = {c: self._kept[c] for c in captions if c in self._kept}
            for start in range(0, len(missing), self._chunk):
                states |= self._encode(missing[start : start + self._chunk])
            for caption, state in states.items():
                self._kept[caption] = state
                self._kept.move_to_end(caption)
            self._shrink()
        return torch.stack([states[caption] for caption in captions])

    @torch.no_grad()
    def _encode(self, captions: list[str]) -> dict[str, Tensor]:
        padded = captions + captions[-1:] * (self._chunk - len(captions))
        # Copies: a view would keep the whole chunk's memory alive.
        # Validation asks under autocast, the batch thread does not; a kept state must not depend
        # on who asked first, or a resumed run would differ.
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            rows = [row.clone() for row in self._encoder.encode(padded)[: len(captions)]]
        return dict(zip(captions, rows, strict=True))

    def _shrink(self) -> None:
        size = next(iter(self._kept.values())).nbytes if self._kept else 0
        while len(self._kept) > 1 and len(self._kept) * size > self._max_bytes:
            self._kept.popitem(last=False)
