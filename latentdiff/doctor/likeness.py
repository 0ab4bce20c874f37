"""Pictures that look the same: a 128-bit outline of each, and the near ones without N² comparisons.

The outline is a difference hash: of the 9×9 cell averages, is a cell brighter than its left (64
bits) and its upper neighbour (64 bits)? It survives scaling, recompression and a change of format,
and knows nothing of colour; so 4×4 cell colours are compared besides.

Two outlines that differ in at most d of 128 bits agree in at least one of d + 1 bands of bits. So
only pictures that share a band are compared, which finds every pair as long as the band is not
shared by more than `REACH` others.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from PIL import Image

Array = np.ndarray[Any, Any]
#: Grey levels by which a cell must be brighter to count: flat ground with noise gives zeros.
MARGIN = 2
#: How far (0…255) the colour of a cell may be off.
COLOUR_DISTANCE = 10
#: Pictures with the same band are compared with so many that follow in sorted order.
REACH = 64
#: Pairs kept at most; then the search ends.
MAX_PAIRS = 20_000_000


def outline_and_colours(image: Image.Image) -> tuple[Array, Array, bool]:
    """Reduce an RGB picture to what is compared.

    Returns: outline uint8 (16,), colours uint8 (48,), whether the picture is of one colour.
    """
    cells = np.asarray(image.resize((9, 9), Image.Resampling.BOX), np.int16)
    grey = cells @ np.array([77, 150, 29], np.int32) >> 8  # (9, 9), weights of ITU-R BT.601
    across = grey[:8, 1:] - grey[:8, :8] > MARGIN
    down = grey[1:, :8] - grey[:8, :8] > MARGIN
    outline = np.packbits(np.concatenate([across.ravel(), down.ravel()]))
    colours = np.asarray(image.resize((4, 4), Image.Resampling.BOX), np.uint8)
    spread = cells.max(axis=(0, 1)) - cells.min(axis=(0, 1))
    return outline, colours.ravel(), bool(spread.max() <= MARGIN)


def similar_to(outlines: Array, colours: Array, distance: int) -> tuple[dict[int, int], bool]:
    """Find pictures that look like an earlier one.

    Goes through the pictures in order and keeps each that is not near one already kept. So what is
    named looks like one that stays, never only like a third that goes too. Where a picture is near
    one that goes, it is compared with the one that stays for it: a crowd of alike pictures is found
    whole though each is compared with REACH others only.

    Args:    outlines: uint8 (N, 16).   colours: uint8 (N, 48).
             distance: bits of 128 that may differ.
    Returns: {index: the kept index that it looks like}, whether all pairs were looked at.
    """
    first, second, complete = near_pairs(outlines, colours, distance)
    found: dict[int, int] = {}

    @cache
    def bits(index: int) -> int:
        return int.from_bytes(outlines[index].tobytes(), "big")

    def near(i: int, j: int) -> bool:
        if (bits(i) ^ bits(j)).bit_count() > distance:
            return False
        apart = np.abs(colours[i].astype(np.int16) - colours[j]).max()
        return bool(apart <= COLOUR_DISTANCE)

    current, tried = -1, set[int]()
    for i, j in zip(first.tolist(), second.tolist(), strict=True):  # ordered by j, then i
        if j != current:
            current, tried = j, set()
        stays = found.get(i, i)
        if j in found or stays in tried:
            continue
        tried.add(stays)
        if stays == i or near(stays, j):
            found[j] = stays
    return found, complete


def near_pairs(outlines: Array, colours: Array, distance: int) -> tuple[Array, Array, bool]:
    """Find all pairs i < j whose outlines differ in at most `distance` bits and colours agree.

    Returns: i (P,), j (P,), ordered by j, then i; False when some pairs may be missing.
    """
    count = len(outlines)
    words = np.ascontiguousarray(outlines).view(np.uint64)  # (N, 2)
    pairs, complete = _Pairs(), True
    for band in _bands(outlines, distance + 1):
        order = np.lexsort((words[:, 1], words[:, 0], band))
        band = band[order]
        for step in range(1, min(REACH, count - 1) + 1):
            left = np.flatnonzero(band[step:] == band[:-step])
            if not len(left):
                break
            a, b = order[left], order[left + step]
            near = _bits_apart(words[a], words[b]) <= distance
            a, b = a[near], b[near]
            near = _colours_apart(colours, a, b) <= COLOUR_DISTANCE
            a, b = a[near], b[near]
            pairs.add(np.maximum(a, b) * count + np.minimum(a, b))
            if pairs.too_many:
                break
        else:
            complete = complete and count - 1 <= REACH
    keys = pairs.merged()
    return keys % max(count, 1), keys // max(count, 1), complete and not pairs.too_many


class _Pairs:
    """Keys of pairs without repeats; merged now and then, as each merge sorts all of them."""

    def __init__(self) -> None:
        self._merged, self._new = np.zeros(0, np.int64), list[Array]()
        self._waiting = 0

    def add(self, keys: Array) -> None:
        if self.too_many:
            return
        self._new.append(keys)
        self._waiting += len(keys)
        if self._waiting > max(1_000_000, len(self._merged)):
            self.merged()

    @property
    def too_many(self) -> bool:
        return len(self._merged) > MAX_PAIRS

    def merged(self) -> Array:
        """All keys, ascending."""
        self._merged = np.unique(np.concatenate([self._merged, *self._new]))
        self._new, self._waiting = [], 0
        return self._merged


def _bands(outlines: Array, count: int) -> list[Array]:
    """Spread the 128 bits over bands, so that a flat corner does not fill one; int64 (N,) each."""
    bits = np.unpackbits(outlines, axis=1)  # (N, 128)
    places = np.random.default_rng(0).permutation(128)
    keys = []
    for part in np.array_split(places, count):
        key = np.zeros(len(outlines), np.int64)
        for place in part[:62]:
            key = key * 2 + bits[:, place]
        keys.append(key)
    return keys


def _bits_apart(a: Array, b: Array) -> Array:
    return np.bitwise_count(a ^ b).sum(axis=1, dtype=np.int64)


def _colours_apart(colours: Array, a: Array, b: Array) -> Array:
    """Largest difference of any cell and channel; in slices, so that memory stays flat."""
    apart = np.zeros(len(a), np.int64)
    for start in range(0, len(a), 100_000):
        part = slice(start, start + 100_000)
        difference = colours[a[part]].astype(np.int16) - colours[b[part]]
        apart[part] = np.abs(difference).max(axis=1, initial=0)
    return apart
