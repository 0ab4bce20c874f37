"""Long lists of keys in few lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def grouped(keys: Iterable[str], few: int = 4) -> list[str]:
    """Keys one a line; those that share their first two words are counted where they are many."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(".".join(re.split(r"\.", key)[:2]), []).append(key)
    lines: list[str] = []
    for start, members in groups.items():
        lines += members if len(members) <= few else [f"{start}.…  ({len(members)} keys)"]
    return lines


def size(count: int) -> str:
    """Bytes for people: 3.44 GB."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} bytes"


def joined(words: Sequence[object]) -> str:
    """Values with commas between."""
    return ", ".join(map(str, words))
