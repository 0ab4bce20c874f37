"""What the doctor has to say about a data set: kinds of findings, and which pictures they name.

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
from typing import Any

import numpy as np

from latentdiff.data.source import Skipped, Source, problems_of
from latentdiff.doctor.likeness import similar_to
from latentdiff.doctor.records import ANIMATED, ONE_COLOUR, READABLE, ROTATED, TRANSPARENT, Records
from latentdiff.doctor.records import WRONG_ENDING as WRONG
from latentdiff.doctor.tokens import TokenCounter
from latentdiff.errors import UserError, choice_error

#: kind → (severity, what it is called in the report).
KINDS = {
    "unreadable": ("left out", "Pictures that cannot be read"),
    "no-caption": ("left out", "Pictures without a caption"),
    "other": ("left out", "Other entries left out"),
    "ignored": ("left out", "Files that are not looked at"),
    "duplicate": ("doubtful", "The same file again"),
    "tiny": ("doubtful", "Tiny pictures"),
    "similar": ("doubtful", "Pictures that look the same"),
    "one-colour": ("doubtful", "Pictures of one colour"),
    "long-caption": ("cut", "Captions over the text encoder's limit"),
    "narrow": ("cut", "Very wide or very tall pictures"),
    "animated": ("cut", "Animations and files of several pages"),
    "small": ("note", "Pictures smaller than the training square"),
    "mode": ("note", "Pictures that are not 8-bit RGB"),
    "transparent": ("note", "Transparent pictures"),
    "rotated": ("note", "Pictures stored sideways"),
    "ending": ("note", "Files whose ending names another format"),
}
#: Kinds that name pictures training could take, so that they can go on the quarantine list.
QUARANTINABLE = (
    "unreadable", "tiny", "duplicate", "similar", "one-colour", "long-caption", "narrow",
    "animated", "small",
)  # fmt: skip
DEFAULT_QUARANTINE = ("unreadable", "tiny", "duplicate")
#: Longer side over shorter from which a picture is called very wide or tall.
NARROW = 3.0


@dataclass(frozen=True)
class Finding:
    """One thing about one picture or file."""

    kind: str
    """A key of KINDS."""
    name: str
    """The picture's name, as training calls it."""
    reason: str
    """What was found."""
    index: int | None = None
    """Which picture of the source; None for what is not in it."""
    like: int | None = None
    """The picture that it is the same as."""


@dataclass(frozen=True)
class Limits:
    """From where on something is a finding."""

    image_size: int
    """Side of the training squares."""
    tiny: int
    """Pictures whose shorter side is below this are tiny."""
    distance: int
    """Bits of 128 in which pictures that look the same may differ; -1 does not look for them."""

    def __post_init__(self) -> None:
        if self.tiny < 0:
            raise UserError(f"--tiny must be at least 0 pixels; got {self.tiny}.")
        if not -1 <= self.distance <= 20:
            raise UserError(f"--similar must be -1 (off) to 20 bits; got {self.distance}.")


class Findings:
    """All findings of a scanned source, made anew at each iteration, so that none is stored.

    Attributes: likeness_complete: whether every pair of outlines that may be near was compared.
    """

    def __init__(
        self,
        source: Source,
        records: Records,
        counter: TokenCounter,
        limits: Limits,
        ignored: list[Skipped],
    ) -> None:
        self.source, self.records, self.counter = source, records, counter
        self.limits, self.ignored = limits, ignored
        self.likeness_complete = True
        self._readable = records.table["flags"] & READABLE > 0

    def __iter__(self) -> Iterator[Finding]:
        for kind in KINDS:
            yield from self.of(kind)

    def of(self, kind: str) -> Iterator[Finding]:
        """Yield the findings of one kind, in the order of the data."""
        outside = {"no-caption", "other", "ignored"}
        return self._outside(kind) if kind in outside else self._inside(kind)

    def _outside(self, kind: str) -> Iterator[Finding]:
        if kind == "ignored":
            yield from (Finding(kind, name, reason) for name, reason in self.ignored)
            return
        for name, reason in problems_of(self.source):
            if (reason == "no caption") == (kind == "no-caption"):
                yield Finding(kind, name, reason)

    def _inside(self, kind: str) -> Iterator[Finding]:
        where, say, like = self._rules[kind]()
        for index in np.flatnonzero(where).tolist():
            other = like.get(index) if like is not None else None
            yield Finding(kind, self.source.name(index), say(index), index, other)

    @property
    def _rules(self) -> dict[str, Callable[[], tuple[Any, Callable[[int], str], Any]]]:
        """kind → (bool (N,), index → reason, index → like)."""
        t, r, lim = self.records.table, self.records, self.limits
        long, short = np.maximum(t["width"], t["height"]), np.minimum(t["width"], t["height"])
        ok, tiny = self._readable, self._readable & (short < lim.tiny)

        def size(i: int) -> str:
            return f"{t['width'][i]} × {t['height'][i]} pixels"

        def said(text: str) -> Callable[[int], str]:
            return lambda i: text

        def same(found: dict[int, int], words: str) -> Any:
            where = np.zeros(len(t), bool)
            where[list(found)] = True
            return where, lambda i: f"{words} {self.source.name(found[i])}", found

        return {
            "unreadable": lambda: (~ok, lambda i: r.reasons[i], None),
            "duplicate": lambda: same(self.duplicates, "the same file as"),
            "tiny": lambda: (tiny, lambda i: f"{size(i)}, shorter side below {lim.tiny}", None),
            "similar": lambda: same(self.similar, "looks like"),
            "one-colour": lambda: (r.flagged(ONE_COLOUR), said("all pixels alike"), None),
            "long-caption": lambda: (t["too_long"] > 0, self._say_long, None),
            "narrow": lambda: (
                ok & (long > NARROW * short),
                lambda i: f"{size(i)}: a centre square keeps {short[i] / long[i]:.0%} of it",
                None,
            ),
            "animated": lambda: (r.flagged(ANIMATED), said("only the first frame is used"), None),
            "small": lambda: (
                ok & (short < lim.image_size) & ~tiny,
                lambda i: f"{size(i)}, enlarged to {lim.image_size}",
                None,
            ),
            "mode": lambda: (self._converted, lambda i: f"mode {r.mode(i)}, turned to RGB", None),
            "transparent": lambda: (r.flagged(TRANSPARENT), said("laid over the background"), None),
            "rotated": lambda: (r.flagged(ROTATED), said("turned upright"), None),
            "ending": lambda: (r.flagged(WRONG), lambda i: f"holds {r.format(i)}", None),
        }

    @property
    def _converted(self) -> Any:
        return self._readable & (self.records.table["mode"] != 0)

    def _say_long(self, index: int) -> str:
        row = self.records.table[index]
        words = f"{row['longest']} tokens, {self.counter.limit} fit"
        several = f" ({row['too_long']} of {row['captions']} captions)" * bool(row["captions"] > 1)
        return words + several

    @cached_property
    def duplicates(self) -> dict[int, int]:
        """Readable pictures whose file came before: index → first index."""
        rows = np.flatnonzero(self._readable)
        if not len(rows):
            return {}
        digests = np.ascontiguousarray(self.records.table["digest"][rows]).view("V16").ravel()
        _, first, group = np.unique(digests, return_index=True, return_inverse=True)
        leader = first[group]
        again = np.flatnonzero(leader != np.arange(len(rows)))
        return dict(zip(rows[again].tolist(), rows[leader[again]].tolist(), strict=True))

    @cached_property
    def similar(self) -> dict[int, int]:
        """Pictures that look like an earlier one; same files and one-colour pictures are not asked.

        One-colour pictures have no outline, so all of them would look alike.
        """
        if self.limits.distance < 0:
            return {}
        asked = self._readable & ~self.records.flagged(ONE_COLOUR)
        asked[list(self.duplicates)] = False
        rows = np.flatnonzero(asked)
        table = self.records.table[rows]
        outlines, colours = (np.ascontiguousarray(table[key]) for key in ("outline", "colours"))
        found, self.likeness_complete = similar_to(outlines, colours, self.limits.distance)
        return {int(rows[a]): int(rows[b]) for a, b in found.items()}


def check_kinds(kinds: list[str]) -> tuple[str, ...]:
    """Check the words of --quarantine. Raises: UserError."""
    for kind in kinds:
        if kind not in QUARANTINABLE:
            raise choice_error("--quarantine", kind, QUARANTINABLE)
    return tuple(dict.fromkeys(kinds))


def quarantined(findings: Findings, kinds: tuple[str, ...]) -> dict[str, str]:
    """Name → reason of the pictures of the chosen kinds; all reasons of a picture in one."""
    reasons: dict[str, str] = {}
    for kind in kinds:
        for finding in findings.of(kind):
            before = reasons.get(finding.name)
            reasons[finding.name] = f"{before}; {finding.reason}" if before else finding.reason
    return reasons
