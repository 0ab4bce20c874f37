"""Reading captions: tables of them, which column holds them, and what counts as one."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

from latentdiff.errors import UserError, did_you_mean

#: Column names tried in this order when none is configured.
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "description", "sentences", "title")


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


def read_table(data: bytes, name: str) -> list[dict[str, Any]]:
    """Read metadata.jsonl or metadata.csv as rows.

    Raises: UserError: with the line that is not valid.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text ({error}). Save it as UTF-8.") from error
    if name.endswith(".csv"):
        return _read_csv(text, name)
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
                f'{name}, line {number} must be like {{"file_name": …}}; got {row!r:.80}'
            )
        rows.append(row)
    return rows


def _read_csv(text: str, name: str) -> list[dict[str, Any]]:
    first = text.split("\n", 1)[0]
    # Spreadsheets in many languages save "CSV" with semicolons; tabs are common too.
    delimiter = max(",;\t", key=first.count)
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise UserError(f"{name} is not valid CSV: {error}") from error
    # Cells beyond the header's columns come under the key None.
    return [{k.strip(): v for k, v in row.items() if isinstance(k, str)} for row in rows]
