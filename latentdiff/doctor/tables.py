"""Counts over a whole data set: sizes, shapes, colour modes, captions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from latentdiff.doctor.records import Records, TokenCounter

#: Aspect ratios (width : height) that images usually have.
RATIOS = (
    (1, 3), (1, 2), (9, 16), (2, 3), (3, 4), (4, 5), (1, 1),
    (5, 4), (4, 3), (3, 2), (16, 9), (2, 1), (3, 1),
)  # fmt: skip


class Row(NamedTuple):
    """A line of a table: words, a count, a remark."""

    label: str
    images: int
    remark: str


def bucket_table(records: Records, image_size: int, multiple: int = 8) -> list[Row]:
    """Sort the readable images by the nearest aspect ratio (nearest in the logarithm).

    Args:   multiple: sides of a bucket are rounded to multiples of this.
    Returns: per ratio the images, the sides of a bucket with about image_size² pixels, and how
        much of the image a square crop would cut away.
    """
    table = records.table[records.readable]
    ratio = table["width"] / np.maximum(table["height"], 1)
    centres = np.log([w / h for w, h in RATIOS])
    nearest = np.searchsorted((centres[1:] + centres[:-1]) / 2, np.log(ratio))
    cut = 1 - np.minimum(ratio, 1 / ratio)
    rows = []
    for number, (w, h) in enumerate(RATIOS):
        here = nearest == number
        if here.any():
            width, height = bucket_sides(w / h, image_size, multiple)
            remark = f"{width} × {height}; a square crop cuts {cut[here].mean():.0%} away"
            rows.append(Row(f"{w}:{h}", int(here.sum()), remark))
    return rows


def bucket_sides(ratio: float, image_size: int, multiple: int = 8) -> tuple[int, int]:
    """Width and height of about image_size² pixels with an aspect ratio, in whole multiples."""
    width, height = image_size * math.sqrt(ratio), image_size / math.sqrt(ratio)
    return (
        max(multiple, round(width / multiple) * multiple),
        max(multiple, round(height / multiple) * multiple),
    )


def mode_table(records: Records) -> list[Row]:
    """Count file formats and colour modes, most frequent first."""
    table = records.table[records.readable]
    pairs = Counter(zip(table["format"].tolist(), table["mode"].tolist(), strict=True))
    words = records.words
    return [
        Row(f"{words[kind]} {words[mode]}", count, conversion_of(words[mode]))
        for (kind, mode), count in pairs.most_common()
    ]


def conversion_of(mode: str) -> str:
    """What training sees of a colour mode."""
    if mode.startswith("I") or mode == "F":
        return "scaled to 8 bit, grey"
    return {
        "RGB": "as it is",
        "P": "palette looked up",
        **dict.fromkeys(("L", "1"), "grey"),
        **dict.fromkeys(("RGBA", "LA", "PA", "La", "RGBa"), "laid over data.background"),
    }.get(mode, "converted to RGB")


def size_table(records: Records) -> list[Row]:
    """Count the readable images by their shorter side, in powers of two."""
    table = records.table[records.readable]
    short = np.minimum(table["width"], table["height"])
    return _powers(short, lambda low, high: f"{low}…{high - 1} pixels")


def caption_table(records: Records, counter: TokenCounter) -> list[Row]:
    """Count the images by the tokens of their longest caption."""
    rows = _powers(records.table["longest"], lambda low, high: f"{low}…{high - 1} tokens")
    over = int((records.table["too_long"] > 0).sum())
    return [*rows, Row(f"over {counter.limit} tokens", over, "cut off at the limit")]


def _powers(values: Any, label: Callable[[int, int], str]) -> list[Row]:
    level = np.frexp(values[values > 0].astype(np.float64))[1] - 1  # floor(log2(value))
    powers, counts = np.unique(level, return_counts=True)
    return [
        Row(label(2**power, 2 ** (power + 1)), count, "")
        for power, count in zip(powers.tolist(), counts.tolist(), strict=True)
    ]
