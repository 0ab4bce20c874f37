"""Images that training shall leave out, listed by name in a file that a person can edit:

    {"name": "images/0007.jpg", "reason": "the same file as images/0003.jpg"}

`latentdiff doctor` writes such a list; `data.quarantine=FILE` makes every trainer honour it. The
images themselves stay where they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from latentdiff.data.source import Example, Skipped, Source, View, problems_of
from latentdiff.errors import UserError, printable
from latentdiff.files import atomic_file


def write_quarantine(file: Path, entries: Iterable[Skipped]) -> int:
    """Write (name, reason) pairs as JSON lines; return how many."""
    count = 0
    with atomic_file(file) as new, new.open("w", encoding="utf-8") as lines:
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


class Unquarantined(View):
    """A source without the images on a quarantine list.

    What a source may have besides (content_key, read, decoded) is here too if it is there.

    Attributes: problems: those of the source; each image left out by the list; names on the list
        that are not in the data.
    Raises: UserError: the list leaves nothing.
    """

    def __init__(self, source: Source, listed: dict[str, str], file: str) -> None:
        names = [source.name(index) for index in range(len(source))]
        super().__init__(source, [i for i, name in enumerate(names) if name not in listed])
        before = problems_of(source)
        unknown = listed.keys() - dict(before).keys() - set(names)
        self.problems: list[Skipped] = [
            *before,
            *((name, f"quarantined: {listed[name]}") for name in names if name in listed),
            *((name, f"in {file}, but not in the data") for name in listed if name in unknown),
        ]
        if not len(self):
            raise UserError(f"data.quarantine: {file} lists all {len(source)} images.")

    def __getitem__(self, index: int) -> Example:
        return self.source[self.source_indices[index]]

    def __getattr__(self, name: str) -> Any:
        if name not in ("content_key", "read", "decoded"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        method = getattr(self.source, name)
        return lambda index, *data: method(self.source_indices[index], *data)

    def fingerprint(self) -> str:
        """Hash the source's fingerprint and which of its images are kept."""
        words = f"{self.source.fingerprint()} {self.source_indices}"
        return hashlib.blake2b(words.encode(), digest_size=16).hexdigest()
