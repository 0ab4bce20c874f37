"""Images that look the same: a 128-bit outline of each, and the near ones without N² comparisons.

The outline is a difference hash: of the 9×9 cell averages, is a cell brighter than its left (64
bits) and its upper neighbour (64 bits)? It survives scaling, recompression and a change of format,
and knows nothing of colour; so 4×4 cell colours are compared besides.

Two outlines that differ in at most d of 128 bits agree in at least one of d + 1 bands of bits. So
only images that share a band are compared, which finds every pair as long as the band is not shared
by more than `REACH` others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

Array = np.ndarray[Any, Any]
#: Grey levels by which a cell must be brighter to count: flat ground with noise gives zeros.
MARGIN = 2
#: How far (0…255) the colour of a cell may be off.
COLOUR_DISTANCE = 10
#: Images with the same band are compared with so many on either side in sorted order.
REACH = 64


def outline_and_colours(image: Image.Image) -> tuple[Array, Array, bool]:
    """Reduce an RGB image to what is compared.

    Returns: outline uint8 (16,), colours uint8 (48,), whether the image is of one colour.
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
    """Find images that look like an earlier one.

    Goes through the images in order and keeps each that is not near one already kept. So what is
    named looks like one that stays, never only like a third that goes too. Where an image is near
    one that goes, it is compared with the one that stays for it: a crowd of alike images is found
    whole though each is compared with its neighbours only.

    Args:    outlines: uint8 (N, 16).   colours: uint8 (N, 48).
             distance: bits of 128 that may differ.
    Returns: {index: the kept index that it looks like}, whether all pairs were looked at.
    """
    words = np.ascontiguousarray(outlines).view(np.uint64)  # (N, 2)
    bands = [_Band(key, words) for key in _keys(outlines, distance + 1)]
    shared = np.logical_or.reduce([band.shared for band in bands])
    stays = np.arange(len(outlines))  # the one that stays for each; itself where it is kept
    for i in np.flatnonzero(shared).tolist():
        others = np.concatenate([band.neighbours(i) for band in bands])
        kept = np.unique(stays[others[others < i]])
        bits_apart = np.bitwise_count(words[kept] ^ words[i]).sum(axis=1, dtype=np.int64)
        kept = kept[bits_apart <= distance]
        colours_apart = np.abs(colours[kept].astype(np.int16) - colours[i]).max(axis=1, initial=0)
        near = kept[colours_apart <= COLOUR_DISTANCE]
        if len(near):
            stays[i] = near[0]
    found = np.flatnonzero(stays != np.arange(len(stays)))
    complete = all(band.longest <= REACH + 1 for band in bands)
    return dict(zip(found.tolist(), stays[found].tolist(), strict=True)), complete


class _Band:
    """Images in the order of some of their bits, alike ones side by side.

    Attributes: shared: whether another image has the same bits, bool (N,); longest: how many at
        most have the same.
    """

    def __init__(self, key: Array, words: Array) -> None:
        order = np.lexsort((words[:, 1], words[:, 0], key))
        first, end = (np.searchsorted(key[order], key, side) for side in ("left", "right"))
        self.shared, self.longest = end - first > 1, int((end - first).max(initial=0))
        # Half the size: there are distance + 1 bands of, perhaps, a million images.
        self._order, self._place = order.astype(np.int32), np.argsort(order).astype(np.int32)
        self._first, self._end = first.astype(np.int32), end.astype(np.int32)

    def neighbours(self, i: int) -> Array:
        """Images with the same bits, at most REACH on either side."""
        first = max(self._first[i], self._place[i] - REACH)
        return self._order[first : min(self._end[i], self._place[i] + REACH + 1)]


def _keys(outlines: Array, count: int) -> list[Array]:
    """Spread the 128 bits over bands, so that a flat corner does not fill one; int64 (N,) each."""
    bits = np.unpackbits(outlines, axis=1)  # (N, 128)
    places = np.random.default_rng(0).permutation(128)
    parts = (part[:62] for part in np.array_split(places, count))
    return [bits[:, part].astype(np.int64) @ (1 << np.arange(len(part))) for part in parts]
