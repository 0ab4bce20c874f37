"""Millions of short texts in little memory: one run of bytes and where each begins.

A Python string costs about 50 bytes beside its letters and a tuple of them as much again.
"""

from __future__ import annotations

from array import array

_BETWEEN = "\x1f"


class Texts:
    """A list of tuples of texts that can only grow."""

    def __init__(self) -> None:
        self._bytes, self._ends = bytearray(), array("Q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> tuple[str, ...]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = self._bytes[self._ends[index] : self._ends[index + 1]]
        return tuple(part.decode("utf-8", "surrogatepass").split(_BETWEEN))

    def append(self, texts: tuple[str, ...]) -> None:
        """Add one tuple of at least one text; the separator within a text becomes a space."""
        joined = _BETWEEN.join(text.replace(_BETWEEN, " ") for text in texts)
        self._bytes += joined.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._bytes))
