"""JSON out of strangers' files: an object, or one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from latentdiff.errors import UserError

#: Characters; the largest that models have, whole vocabularies with their merges, are under 10 MB.
LONGEST = 64 * 2**20


def read_json(file: Path) -> dict[str, Any]:
    """What a file holds. Raises: UserError: see `parse_json`; or it is missing or too large."""
    try:
        if (length := file.stat().st_size) > LONGEST:
            raise UserError(f"{file} is no configuration: it has {length:,} bytes.")
        return parse_json(file.read_text(encoding="utf-8"), file)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from error


def parse_json(text: str, where: object) -> dict[str, Any]:
    """What a text holds.

    Args:    where: what it was read from, for the message.
    Raises:  UserError: not JSON, nested too deeply, a number of thousands of digits, or no object.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{where} must hold a JSON object; it holds a {type(found).__name__}.")
    return found
