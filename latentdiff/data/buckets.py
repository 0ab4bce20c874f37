"""Aspect-ratio buckets: a few image shapes of about the same area, and which image goes where.

A tall image that is cut to a square loses its head and feet. With buckets it is cut to the
nearest of some shapes instead; a batch holds images of one shape, so that tensors stay whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from latentdiff.data.source import DataConfig

Size = tuple[int, int]


def bucket_sizes(size: int, step: int, max_ratio: float) -> tuple[Size, ...]:
    """All (height, width) in multiples of `step` that hold as much of size² pixels as they can.

    For each width the largest height with h·w ≤ size² is taken, and the same turned on its side;
    shapes longer than `max_ratio` are left out. For size 512, step 64 and ratio 2 these are,
    heights first, 640×384, 576×448, 512×512, 448×576, 384×640.

    Returns: from the tallest to the widest.
    """
    found: set[Size] = set()
    for short in range(step, size + 1, step):
        long = size * size // short // step * step
        if long <= max_ratio * short:
            found |= {(long, short), (short, long)}
    return tuple(sorted(found, key=lambda shape: (-shape[0] / shape[1], shape)))


def sizes_of(config: DataConfig) -> tuple[Size, ...]:
    """The (height, width) that images of a configuration may be brought to."""
    if not config.buckets:
        return ((config.image_size, config.image_size),)
    return bucket_sizes(config.image_size, config.bucket_step, config.bucket_max_ratio)


def nearest(sizes: Sequence[Size], width: int, height: int) -> int:
    """Which of some (height, width) has the aspect ratio nearest to an image's, on a log scale."""
    wanted = math.log(width / height)
    return min(range(len(sizes)), key=lambda i: abs(math.log(sizes[i][1] / sizes[i][0]) - wanted))
