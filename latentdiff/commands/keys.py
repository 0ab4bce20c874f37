"""Long lists of keys in few lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

#: kohya's names have _ for every dot of the layer's: up to the block's number.
_FLAT = re.compile(
    r"(lora_(?:unet|te\d?)_(?:(?:down|up|input|output|double|single)_blocks_\d+|mid_block|"
    r"middle_block|text_model_encoder_layers)_)."
)


def grouped(keys: Iterable[str], few: int = 4) -> list[str]:
    """Keys one a line; those that share their first words are counted where they are many."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(_start(key), []).append(key)
    lines: list[str] = []
    for start, members in groups.items():
        lines += members if len(members) <= few else [f"{start}…  ({len(members)} keys)"]
    return lines


def _start(key: str) -> str:
    """What a group of keys has in common: two words, or the part and block of kohya's names."""
    if flat := _FLAT.match(key):
        return flat[1]
    words = 4 if key.startswith("base_model.model.") else 2
    return ".".join(key.split(".")[:words]) + "."


def size(count: int) -> str:
    """Bytes for people: 3.44 GB."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} bytes"


def joined(words: Sequence[object]) -> str:
    """Values with commas between."""
    return ", ".join(map(str, words))
