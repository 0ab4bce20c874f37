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

from latentdiff.data.source import Example, Skipped, Source, group_of, problems_of
from latentdiff.errors import UserError, printable


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
        if name not in ("content_key", "read", "mask", "look"):
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
