"""What the doctor keeps of each picture: a fixed number of bytes, so that a million fit in memory.

A record is 112 bytes. Texts that only some pictures need (why one cannot be read) are kept apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np

#: Pillow's mode of the file, in the order of its code in a record.
MODES = (
    "RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16",
    "I;16B", "I;16L", "I;16N", "La", "RGBa", "RGBX", "?",
)  # fmt: skip

READABLE = 1
ANIMATED = 2
ROTATED = 4
TRANSPARENT = 8
ONE_COLOUR = 16
WRONG_ENDING = 32

RECORD = np.dtype(
    [
        ("width", np.int32),
        ("height", np.int32),
        ("longest", np.int32),  # tokens of the longest caption
        ("too_long", np.int32),  # captions over the limit
        ("flags", np.uint8),
        ("mode", np.uint8),
        ("format", np.uint8),
        ("captions", np.uint8),  # how many, 255 for more
        ("digest", np.uint8, 16),  # of the file
        ("outline", np.uint8, 16),  # see likeness.outline_and_colours
        ("colours", np.uint8, 48),
    ],
    align=True,
)


class Records:
    """Records of all pictures of a source, filled in any order.

    Attributes: table: structured array (N,); reasons: why a picture cannot be read, by index.
    """

    def __init__(self, count: int) -> None:
        self.table = np.zeros(count, RECORD)
        self.reasons: dict[int, str] = {}
        self.formats: list[str] = []

    def __len__(self) -> int:
        return len(self.table)

    def put(self, index: int, facts: dict[str, Any], reason: str | None) -> None:
        """Store one picture's facts; `mode` and `format` are words here, numbers in the table."""
        row = self.table[index]
        if reason is not None:
            self.reasons[index] = reason
        for name, value in facts.items():
            row[name] = self._code(name, value) if isinstance(value, str) else value

    def flagged(self, flag: int) -> np.ndarray[Any, Any]:
        """Which readable pictures have a flag: bool (N,)."""
        flags = self.table["flags"]
        return (flags & READABLE > 0) & (flags & flag > 0)

    def mode(self, index: int) -> str:
        """Pillow's mode of one picture's file."""
        return MODES[int(self.table["mode"][index])]

    def format(self, index: int) -> str:
        """The file format of one picture, by its content."""
        return self.formats[int(self.table["format"][index])]

    def _code(self, name: str, word: str) -> int:
        if name == "mode":
            return MODES.index(word if word in MODES else "?")
        if word not in self.formats:
            self.formats.append(word)
        return self.formats.index(word)
