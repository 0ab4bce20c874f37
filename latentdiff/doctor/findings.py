"""What the doctor has to say about a data set: kinds of findings, and which images they name.

| severity | meaning |
|---|---|
| left out | training cannot use it, and leaves it out by itself |
| doubtful | training uses it and may be better off without it: put it on the quarantine list |
| cut | training uses part of it |
| note | training uses all of it, in another form |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from latentdiff.data.encoder import nearest, sizes_of, usual_sizes
from latentdiff.data.source import DataConfig, Skipped, Source, problems_of
from latentdiff.doctor.likeness import similar_to
from latentdiff.doctor.records import (
    ANIMATED,
    ONE_COLOUR,
    ROTATED,
    TRANSPARENT,
    WRONG_ENDING,
    Array,
    Records,
    TokenCounter,
)
from latentdiff.errors import UserError, choice_error


class Kind(NamedTuple):
    """A kind of findings."""

    severity: str
    """See the table of this module."""
    title: str
    """What it is called in the report."""


KINDS = {
    "unreadable": Kind("left out", "Images that cannot be read"),
    "no-caption": Kind("left out", "Images without a caption"),
    "other": Kind("left out", "Other entries left out"),
    "ignored": Kind("left out", "Files that are not looked at"),
    "duplicate": Kind("doubtful", "The same file again"),
    "tiny": Kind("doubtful", "Tiny images"),
    "similar": Kind("doubtful", "Images that look the same"),
    "one-colour": Kind("doubtful", "Images of one colour"),
    "long-caption": Kind("cut", "Captions over the text encoder's limit"),
    "narrow": Kind("cut", "Very wide or very tall images"),
    "animated": Kind("cut", "Animations and files of several pages"),
    "small": Kind("note", "Images that training enlarges"),
    "mode": Kind("note", "Images that are not 8-bit RGB"),
    "transparent": Kind("note", "Transparent images"),
    "rotated": Kind("note", "Images stored sideways"),
    "ending": Kind("note", "Files whose ending names another format"),
}
#: Kinds that name images training could take, so that they can go on the quarantine list.
QUARANTINABLE = (
    "unreadable", "tiny", "duplicate", "similar", "one-colour", "long-caption", "narrow",
    "animated", "small",
)  # fmt: skip
DEFAULT_QUARANTINE = ("unreadable", "tiny", "duplicate")
#: Longer side over shorter from which an image is called very wide or tall.
NARROW = 3.0


@dataclass(frozen=True)
class Finding:
    """One thing about one image or file."""

    kind: str
    """A key of KINDS."""
    name: str
    """The image's name, as training calls it."""
    reason: str
    """What was found."""
    index: int | None = None
    """Which image of the source; None for what is not in it."""
    like: int | None = None
    """The image that it is the same as."""


@dataclass(frozen=True)
class Order:
    """What is asked of the doctor."""

    data: DataConfig
    """The data set, opened as training opens it."""
    tiny: int
    """Images whose shorter side is below this are tiny."""
    distance: int
    """Bits of 128 in which images that look the same may differ; -1 does not look for them."""
    counter: TokenCounter
    """How captions are counted."""
    quarantine: tuple[str, ...]
    """Kinds of findings that go on the quarantine list."""
    output: Path
    """Folder of the report; it is made."""
    threads: int
    """Images looked at at a time."""
    shown: int
    """Images shown of each kind."""

    def __post_init__(self) -> None:
        if self.tiny < 0:
            raise UserError(f"--tiny must be at least 0 pixels; got {self.tiny}.")
        if not -1 <= self.distance <= 20:
            raise UserError(f"--similar must be -1 (off) to 20 bits; got {self.distance}.")


class Findings:
    """All findings of a scanned source, made anew at each iteration, so that none is stored.

    Args: ignored: (name, reason) of files that training does not look at.
    Attributes: likeness_complete: whether every pair of outlines that may be near was compared.
    """

    def __init__(
        self, source: Source, records: Records, order: Order, ignored: list[Skipped]
    ) -> None:
        self.source, self.records, self.order = source, records, order
        self.ignored, self.likeness_complete = ignored, True

    def __iter__(self) -> Iterator[Finding]:
        for kind in KINDS:
            yield from self.of(kind)

    def of(self, kind: str) -> Iterator[Finding]:
        """Yield the findings of one kind, in the order of the data."""
        if kind == "ignored":
            yield from (Finding(kind, name, reason) for name, reason in self.ignored)
        elif kind in ("no-caption", "other"):
            for name, reason in problems_of(self.source):
                if (reason == "no caption") == (kind == "no-caption"):
                    yield Finding(kind, name, reason)
        else:
            where, say = self._rules[kind]
            like = {"duplicate": self.duplicates, "similar": self.similar}.get(kind, {})
            for i in np.flatnonzero(where).tolist():
                yield Finding(kind, self.source.name(i), say(i), i, like.get(i))

    @cached_property
    def _rules(self) -> dict[str, tuple[Array, Callable[[int], str]]]:
        """kind → bool (N,), index → reason."""
        r, t, ok = self.records, self.records.table, self.records.readable
        least = self.order.tiny
        long, short = np.maximum(t["width"], t["height"]), np.minimum(t["width"], t["height"])
        tiny = ok & (short < least)

        def size(i: int) -> str:
            return f"{t['width'][i]} × {t['height'][i]} pixels"

        def name(i: int) -> str:
            return self.source.name(i)

        def among(found: dict[int, int]) -> Array:
            return np.isin(np.arange(len(t)), list(found))

        return {
            "unreadable": (~ok, lambda i: r.reasons[i]),
            "duplicate": (
                among(self.duplicates),
                lambda i: f"the same file as {name(self.duplicates[i])}",
            ),
            "tiny": (tiny, lambda i: f"{size(i)}, shorter side below {least}"),
            "similar": (among(self.similar), lambda i: f"looks like {name(self.similar[i])}"),
            "one-colour": (r.flagged(ONE_COLOUR), lambda i: "all pixels alike"),
            "long-caption": (t["too_long"] > 0, self._say_long),
            "narrow": (
                ok & (long > NARROW * short),
                lambda i: f"{size(i)}: a centre square keeps {short[i] / long[i]:.0%} of it",
            ),
            "animated": (r.flagged(ANIMATED), lambda i: "only the first frame is used"),
            "small": (
                ok & self._enlarged(t["width"], t["height"]) & ~tiny,
                lambda i: f"{size(i)}, enlarged",
            ),
            "mode": (ok & (t["mode"] != 0), lambda i: f"mode {r.word('mode', i)}, turned to RGB"),
            "transparent": (r.flagged(TRANSPARENT), lambda i: "laid over the background"),
            "rotated": (r.flagged(ROTATED), lambda i: "turned upright"),
            "ending": (r.flagged(WRONG_ENDING), lambda i: f"holds {r.word('format', i)}"),
        }

    def _enlarged(self, widths: Array, heights: Array) -> Array:
        """Which images training would enlarge, (N,) bool."""
        data = self.order.data
        sizes, usual = sizes_of(data), usual_sizes(data)
        pairs, places = np.unique(np.stack([widths, heights], 1), axis=0, return_inverse=True)
        found = []
        for width, height in pairs.tolist():
            if not width * height:  # of what cannot be read
                found.append(False)
                continue
            size = sizes[nearest(sizes, width, height, usual)]
            scales = size[1] / width, size[0] / height
            found.append((min if data.crop == "pad" else max)(scales) > 1)
        return np.array(found, dtype=bool)[places.reshape(-1)]

    def _say_long(self, index: int) -> str:
        row = self.records.table[index]
        words = f"{row['longest']} tokens, {self.order.counter.limit} fit"
        several = f" ({row['too_long']} of {row['captions']} captions)" * bool(row["captions"] > 1)
        return words + several

    @cached_property
    def duplicates(self) -> dict[int, int]:
        """Readable images whose file came before: index → first index."""
        rows = np.flatnonzero(self.records.readable)
        digests = np.ascontiguousarray(self.records.table["digest"][rows]).view("V16").ravel()
        _, first, group = np.unique(digests, return_index=True, return_inverse=True)
        leader = first[group]
        again = np.flatnonzero(leader != np.arange(len(rows)))
        return dict(zip(rows[again].tolist(), rows[leader[again]].tolist(), strict=True))

    @cached_property
    def similar(self) -> dict[int, int]:
        """Images that look like an earlier one; same files and one-colour images are not asked.

        One-colour images have no outline, so all of them would look alike.
        """
        if self.order.distance < 0:
            return {}
        asked = self.records.readable & ~self.records.flagged(ONE_COLOUR)
        asked[list(self.duplicates)] = False
        rows = np.flatnonzero(asked)
        table = self.records.table[rows]
        found, self.likeness_complete = similar_to(
            table["outline"], table["colours"], self.order.distance
        )
        return {int(rows[a]): int(rows[b]) for a, b in found.items()}


def check_kinds(kinds: list[str]) -> tuple[str, ...]:
    """Check the words of --quarantine. Raises: UserError."""
    for kind in kinds:
        if kind not in QUARANTINABLE:
            raise choice_error("--quarantine", kind, QUARANTINABLE)
    return tuple(dict.fromkeys(kinds))


def quarantined(findings: Findings, kinds: tuple[str, ...]) -> dict[str, str]:
    """Name → reason of the images of the chosen kinds; all reasons of an image in one."""
    reasons: dict[str, str] = {}
    for kind in kinds:
        for finding in findings.of(kind):
            before = reasons.get(finding.name)
            reasons[finding.name] = f"{before}; {finding.reason}" if before else finding.reason
    return reasons
