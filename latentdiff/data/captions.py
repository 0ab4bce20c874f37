"""Reading captions: tables of them, which column holds them, and what counts as one."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from latentdiff.errors import UserError, did_you_mean, whole_text

#: Column names tried in this order when none is configured.
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "description", "sentences", "title")
#: A text file beside an image is a caption up to this size.
MAX_CAPTION_BYTES = 2**20
#: Byte order marks other than UTF-8's; that of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


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
    texts = (whole_text(str(v)).strip() for v in values if isinstance(v, str | int | float))
    return tuple(dict.fromkeys(text for text in texts if text))


def decode_text(data: bytes) -> str:
    """Decode UTF-8, or what the byte order mark at the start says.

    Raises: ValueError: it is neither, such as a Windows code page or UTF-16 without a mark.
    """
    coding = next((coding for mark, coding in _MARKS if data.startswith(mark)), "UTF-8")
    try:
        text = data.decode("utf-8-sig" if coding == "UTF-8" else coding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not {coding} text ({error}); save it as UTF-8") from error
    if "\0" in text:
        raise ValueError(
            "it holds zero bytes, as UTF-16 without a byte order mark does; save it as UTF-8"
        )
    return text


def read_text(file: Path) -> str:
    """A text file that somebody wrote. Raises: UserError: what it is, and where it is not text."""
    try:
        return decode_text(file.read_bytes())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file} cannot be read: {reason}.") from error


def read_lines(file: Path) -> list[str]:
    """The lines of such a file, whatever ends them. Raises: as `read_text`."""
    # Not splitlines(): a text may hold a character that Unicode counts as a line's end.
    return re.split(r"\r\n?|\n", read_text(file))


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
        return [row for _, row in csv_rows(text, name, column)]
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


def csv_rows(text: str, name: str, column: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a CSV file with a header, and each one's first line.

    Args:   column: the last one, where a text without quotes may hold commas.
    Raises: UserError: with the line that is not valid.
    """
    first = next((line for line in io.StringIO(text, newline="") if line.strip()), "")
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
        yield line, dict.fromkeys(header) | dict(zip(header, cells, strict=False))


def _records(text: str, name: str, **form: Any) -> Iterator[tuple[int, list[str]]]:
    """First line's number and cells of each record that is not empty."""
    taken: list[str] = []

    def lines() -> Iterator[str]:
        for line in io.StringIO(text, newline=""):
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
