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


class ContextCache:
    """Text states of captions, the most recently used ones kept.

    Captions are encoded one at a time: matrix products of another batch size round differently, and
    after a resume the cache is empty, so batches of what happens to be missing would make the
    context depend on the history of the run.

    Args:
        encoder: the frozen text encoder.
        max_bytes: how much memory the kept states may take.
    """

    def __init__(self, encoder: Encoder | Any, max_bytes: int = 2**30) -> None:
        self._encoder, self._max_bytes = encoder, max_bytes
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        # Validation encodes its prompts while the batch thread is at work.
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Return the context of each caption, (B, tokens, width)."""
        with self._lock:
            return torch.stack([self._one(caption) for caption in captions])

    def _one(self, caption: str) -> Tensor:
        if caption in self._kept:
            self._kept.move_to_end(caption)
            return self._kept[caption]
        with torch.no_grad():
            state = self._encoder.encode([caption])[0]
        self._kept[caption] = state
        while len(self._kept) > 1 and len(self._kept) * state.nbytes > self._max_bytes:
            self._kept.popitem(last=False)
        return state
