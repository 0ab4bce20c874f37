"""What the doctor has to say about a data set: kinds of findings, and which pictures they name.

| severity | meaning |
|---|---|
| left out | training cannot use it, and leaves it out by itself |
| doubtful | training uses it and may be better off without it: put it on the quarantine list |
| cut | training uses part of it |
| note | training uses all of it, in another form |

Of each picture a record of 112 bytes is kept, so that a million fit in memory. Texts that only some
pictures need (why one cannot be read) are kept apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.data.source import Skipped, Source, problems_of
from latentdiff.doctor.likeness import similar_to
from latentdiff.embedded import named
from latentdiff.errors import UserError, choice_error
from latentdiff.files import read_json
from latentdiff.models.tokenizer import EOS, clip_tokenizer, load_tokenizer

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


#: What CLIP's text encoder takes, begin and end mark included.
CLIP_LIMIT = 77


@dataclass(frozen=True)
class TokenCounter:
    """A way of counting."""

    count: Callable[[str], int]
    """Text → tokens, begin and end mark included."""
    limit: int
    """What the text encoder takes."""
    words: str
    """How the report calls it."""


def open_counter(folder: str | None, limit: int | None) -> TokenCounter:
    """Open a tokenizer.

    Args:    folder: a model folder, its tokenizer folder, or `embedded`; None: CLIP's own, which
             Stable Diffusion 1.x and 2.x have.
             limit: tokens that the text encoder takes; None asks the folder, else 77.
    Raises:  UserError: the folder holds no tokenizer.
    """
    if folder is None:
        count, words = clip_tokenizer(EOS).count, "counted by CLIP's own tokenizer"
        return TokenCounter(count, limit or CLIP_LIMIT, words)
    home = Path(named(folder)).expanduser()
    inner = home / "tokenizer"
    inner = inner if inner.is_dir() else home
    tokenizer = load_tokenizer(inner, limit or _positions(home) or CLIP_LIMIT)
    words = f"counted by the tokenizer in {inner}"
    return TokenCounter(tokenizer.count, limit or tokenizer.max_length, words)


def _positions(folder: Path) -> int | None:
    try:
        return int(read_json(folder / "text_encoder" / "config.json")["max_position_embeddings"])
    except (OverflowError, ValueError, KeyError, TypeError):
        return None


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
            "ending": lambda: (r.flagged(WRONG_ENDING), lambda i: f"holds {r.format(i)}", None),
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
