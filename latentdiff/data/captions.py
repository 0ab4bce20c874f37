"""Reading captions: tables of them, which column holds them, and what counts as one.

Pictures that training shall leave alone are listed by name in a file that a person can edit:

    {"name": "images/0007.jpg", "reason": "the same file as images/0003.jpg"}

`latentdiff doctor` writes such a list; `data.quarantine=FILE` makes every trainer honour it. The
pictures themselves stay where they are.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentdiff.data.source import Example, Skipped, Source, group_of, problems_of
from latentdiff.errors import UserError, did_you_mean, printable

#: Column names tried in this order when none is configured.
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "description", "sentences", "title")
#: A text file beside a picture is a caption up to this size.
MAX_CAPTION_BYTES = 2**20
#: Byte order marks other than UTF-8's; that of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
#: With their ends, which are not those of str.splitlines.
_LINES = re.compile(r"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+")


def choose_caption_column(columns: Sequence[str], wanted: str | None, where: str) -> str:
    """Pick the caption column of a table.

    Raises: UserError: `wanted` is not there, or no usual name is; both list the columns.
    """
    listing = ", ".join(columns) or "none"
    if wanted is not None:
        if wanted in columns:
            return wanted
        raise UserError(
            f"data.caption_column: {where} has no column '{wanted}'; its columns are {listing}."
            f"{did_you_mean(wanted, columns)}"
        )
    for name in CAPTION_COLUMNS:
        if name in columns:
            return name
    raise UserError(
        f"{where} has no column named {', '.join(CAPTION_COLUMNS[:-1])} or {CAPTION_COLUMNS[-1]}; "
        f"its columns are {listing}. Say which one holds the captions: data.caption_column=NAME."
    )


def clean_captions(value: object) -> tuple[str, ...]:
    """Turn a cell (text, list of texts, or nothing) into captions without empty ones or repeats."""
    values: Iterable[object] = value if isinstance(value, list | tuple) else [value]
    texts = (_whole(str(v)).strip() for v in values if isinstance(v, str | int | float))
    return tuple(dict.fromkeys(text for text in texts if text))


def _whole(text: str) -> str:
    """Replace halves of surrogate pairs (emoji cut in two by an export), which UTF-8 refuses."""
    return text.encode("utf-8", "replace").decode("utf-8")


def decode_text(data: bytes) -> str:
    """Decode UTF-8, or what the byte order mark at the start says.

    Raises: ValueError: it is neither, such as a Windows code page or UTF-16 without a mark.
    """
    coding = next((coding for mark, coding in _MARKS if data.startswith(mark)), "UTF-8")
    try:
        text = data.decode("utf-8-sig" if coding == "UTF-8" else coding)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not {coding} text ({error}); save it as UTF-8") from error
    if "\0" in text:
        raise ValueError(
            "it holds zero bytes, as UTF-16 without a byte order mark does; save it as UTF-8"
        )
    return text


def read_table(data: bytes, name: str, column: str | None = None) -> list[dict[str, Any]]:
    """Read metadata.jsonl or metadata.csv as rows.

    Args:   column: the caption column, if the user named one.
    Raises: UserError: with the line that is not valid.
    """
    try:
        text = decode_text(data)
    except ValueError as error:
        raise UserError(f"{name} cannot be read: {error}.") from error
    if name.lower().endswith(".csv"):
        return list(_read_csv(text, name, column))
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(
                f'{name}, line {number} must be like {{"file_name": …}}; got {line.strip():.80}'
            )
        rows.append(row)
    return rows


def _read_csv(text: str, name: str, column: str | None) -> Iterator[dict[str, Any]]:
    first = next((line for line in _lines(text) if line.strip()), "")
    # Spreadsheets in many languages save "CSV" with semicolons; tabs are common too.
    delimiter = max(",;\t", key=first.count)
    spaced = f"{delimiter} " in first
    records = _records(text, name, delimiter=delimiter, skipinitialspace=spaced)
    header = [cell.strip() for cell in _trimmed(next(records, (0, []))[1])]
    for line, cells in records:
        cells = _trimmed(cells, len(header))
        if len(cells) > len(header):
            if header[-1] != choose_caption_column(header, column, name):
                raise UserError(
                    f"{name}, line {line} has {len(cells)} cells, its header has {len(header)} "
                    f"({', '.join(header)}). Put quotes around texts that hold {delimiter!r}."
                )
            # What is left over belongs to the caption, which stands without quotes.
            caption = (delimiter + " " * spaced).join(cells[len(header) - 1 :])
            cells = [*cells[: len(header) - 1], caption]
        yield dict.fromkeys(header) | dict(zip(header, cells, strict=False))


def _records(text: str, name: str, **form: Any) -> Iterator[tuple[int, list[str]]]:
    """First line's number and cells of each record that is not empty."""
    taken: list[str] = []

    def lines() -> Iterator[str]:
        for line in _lines(text):
            taken.append(line)
            yield line

    reader = csv.reader(lines(), **form)
    while True:
        number = reader.line_num + 1
        taken.clear()
        try:
            cells = next(reader, None)
            if len(taken) > 1:  # perhaps a quote that nobody closed, which takes lines along
                next(csv.reader(taken, strict=True, **form))
        except csv.Error as error:
            raise UserError(
                f"{name}, line {number} is not valid CSV: {error}. A text in quotes ends with a "
                'quote before the next comma or line; a quote within it is written "".'
            ) from error
        if cells is None:
            return
        if cells:
            yield number, cells


def _lines(text: str) -> Iterator[str]:
    return (match[0] for match in _LINES.finditer(text))


def _trimmed(cells: list[str], least: int = 0) -> list[str]:
    """Without the empty cells that spreadsheets add at the end."""
    count = len(cells)
    while count > least and not cells[count - 1].strip():
        count -= 1
    return cells[:count]


_BETWEEN = "\x1f"


class Texts:
    """A list of tuples of texts that can only grow: one run of bytes, and where each begins.

    For millions: a Python string costs about 50 bytes beside its letters, a tuple as much again.
    """

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


def write_quarantine(file: Path, entries: Iterable[Skipped]) -> int:
    """Write (name, reason) pairs as JSON lines; return how many."""
    count = 0
    with file.open("w", encoding="utf-8") as lines:
        for name, reason in entries:
            lines.write(json_line({"name": name, "reason": reason}))
            count += 1
    return count


def json_line(entry: Mapping[str, str]) -> str:
    """Write a line of JSON that stays readable and does not act on a terminal that shows it."""
    text = json.dumps(entry, ensure_ascii=False)
    signs = (sign if printable(sign) == sign else f"\\u{ord(sign):04x}" for sign in text)
    return "".join(signs) + "\n"


def read_quarantine(file: str | Path) -> dict[str, str]:
    """Read name → reason; further keys of a line are ignored, a missing reason is "listed".

    Raises: UserError: the file is not there, or a line (given by number) is not an entry.
    """
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.quarantine: {file} cannot be read ({error}). Give the quarantine.jsonl that "
            "`latentdiff doctor` wrote, or null."
        ) from error
    entries: dict[str, str] = {}
    # Not splitlines(): a file name may hold a character that Unicode counts as a line's end.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name = entry["name"]
        except (ValueError, KeyError, TypeError, RecursionError):
            name = None
        if not isinstance(name, str):
            raise UserError(
                f'data.quarantine: {file}, line {number} must be like {{"name": "a.png", '
                f'"reason": "…"}}; got {line.strip():.80}'
            )
        entries[name] = str(entry.get("reason") or "listed")
    return entries


class Unquarantined:
    """A source without the pictures on a quarantine list.

    What a source may have besides (group, content_key, read) is here too if it is there.

    Attributes: problems: those of the source; each picture left out by the list; names on the list
        that are not in the data.
    Raises: UserError: the list leaves nothing.
    """

    def __init__(self, source: Source, listed: dict[str, str], file: str) -> None:
        self._source = source
        self._kept: list[int] = []
        self.problems: list[Skipped] = problems_of(source)
        unknown = dict.fromkeys(listed)
        for name, _ in self.problems:
            unknown.pop(name, None)
        for index in range(len(source)):
            name = source.name(index)
            if name in listed:
                self.problems.append((name, f"quarantined: {listed[name]}"))
                unknown.pop(name, None)
            else:
                self._kept.append(index)
        self.problems += [(name, f"in {file}, but not in the data") for name in unknown]
        if not self._kept:
            raise UserError(f"data.quarantine: {file} lists all {len(source)} pictures.")

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Example:
        return self._source[self._kept[index]]

    def __getattr__(self, name: str) -> Any:
        if name not in ("content_key", "read"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        method = getattr(self._source, name)
        return lambda index: method(self._kept[index])

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of one picture."""
        return self._source.captions(self._kept[index])

    def name(self, index: int) -> str:
        """Return the name of one picture, as it is without the list."""
        return self._source.name(self._kept[index])

    def group(self, index: int) -> str:
        """Return the key that `split` keeps together."""
        return group_of(self._source, self._kept[index])

    def fingerprint(self) -> str:
        """Hash the source's fingerprint and which of its pictures are kept."""
        words = f"{self._source.fingerprint()} {self._kept}"
        return hashlib.blake2b(words.encode(), digest_size=16).hexdigest()
